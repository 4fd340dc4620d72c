"""What needs a GPU, run as far as it goes without one: vLLM's own engine core, executor and worker around a stub."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace

import fake_nccl
import pytest
import torch

from flowrl_kernels.trainer.parallel import ALONE
from flowrl_kernels.trainer.rollout import nccl, push, serve, vllm_head
from flowrl_kernels.trainer.rollout.faults import Fault
from flowrl_kernels.trainer.rollout.vllm import VLLMEngine


class Memory:
    """A sleep-mode backend whose level 2 forgets everything, as vLLM's allocator on a GPU does."""

    def __init__(self, model):
        self.model, self.awake = model, {"weights", "kv_cache"}

    def suspend(self, level):
        assert level == 2
        self.awake = set()
        for buffer in self.model.buffers():
            buffer.zero_()

    def resume(self, tags):
        self.awake |= set(tags)


@pytest.fixture
def sleeper(monkeypatch):
    """(our engine, what it did) on vLLM's real sleep and wake_up of core, executor and worker."""
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.executor.abstract import Executor
    from vllm.v1.worker.gpu_worker import Worker

    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.accelerator, "get_memory_info", lambda: (1, 2))
    did, model = [], torch.nn.Module()
    model.register_buffer("rotary", torch.arange(5.0), persistent=False)  # no push brings it back
    memory = Memory(model)
    worker = object.__new__(Worker)
    worker.model_runner = SimpleNamespace(model=model)
    worker.vllm_config = SimpleNamespace(model_config=SimpleNamespace(enable_nccl_comm_suspend=False))
    worker.model_config = SimpleNamespace(sleep_preserve_parameter_names=[])
    worker._sleep_mode_backend, worker._sleep_saved_parameters = memory, {}
    worker._sleep_saved_buffers, worker._sleep_saved_draft_buffers = {}, {}
    worker.get_draft_model = worker.synchronize_device = lambda: None

    class Alone(Executor):
        def collective_rpc(self, method, timeout=None, args=(), kwargs=None, **more):
            return [getattr(worker, method)(*args, **(kwargs or {}))]

    Alone.__abstractmethods__ = frozenset()
    executor = object.__new__(Alone)
    executor.sleeping_tags = set()
    core = SimpleNamespace(
        model_executor=executor,
        pause_scheduler=lambda mode, clear_cache: did.append("pause"),
        resume_scheduler=lambda: did.append("resume"),
    )
    engine = object.__new__(VLLMEngine)
    engine.cuda, engine.asleep, engine.group, engine.world = True, False, 1, ALONE

    def load(name, kwargs):
        did.append((name, sorted(memory.awake), model.rotary.tolist()))

    engine.llm = SimpleNamespace(
        sleep=lambda level: EngineCore.sleep(core, level),
        wake_up=lambda tags: EngineCore.wake_up(core, tags),
        collective_rpc=load,
        reset_prefix_cache=lambda: did.append("reset") or True,
        llm_engine=SimpleNamespace(set_weight_version=lambda label: None),
    )
    return engine, did, executor, memory


def test_weights_are_loaded_into_an_engine_that_sleeps_and_it_is_wholly_awake_after_them(sleeper):
    engine, did, executor, memory = sleeper
    for version in (1, 2):
        did.clear()
        engine.release()
        assert executor.is_sleeping
        assert memory.awake == set()
        engine.update_weights([], version)
        load = ("reload_weights", ["weights"], [0.0, 1.0, 2.0, 3.0, 4.0])  # what no push brings is back by then
        assert did == ["pause", load, "resume", "reset"]
        assert not executor.is_sleeping
        assert memory.awake == {"weights", "kv_cache"}


def test_the_head_is_hooked_into_what_vllms_runner_and_sampler_have():
    import inspect

    from vllm.v1.sample.logits_processor import LogitsProcessors
    from vllm.v1.sample.metadata import SamplingMetadata
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler
    from vllm.v1.sample.sampler import Sampler
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    run = inspect.getsource(GPUModelRunner.execute_model)
    assert "self.model.compute_logits(sample_hidden_states)" in run
    assert "self.sampler(" in inspect.getsource(GPUModelRunner._sample)
    assert list(inspect.signature(Sampler.forward).parameters)[1:3] == ["logits", "sampling_metadata"]
    assert "processed_logprobs" in inspect.getsource(TopKTopPSampler.forward_native)
    plain = dict.fromkeys(SamplingMetadata.__dataclass_fields__)
    plain |= {"no_penalties": True, "bad_words_token_ids": {}, "logitsprocs": LogitsProcessors()}
    assert not vllm_head.changes(SamplingMetadata(**plain))
    bias = SimpleNamespace(is_argmax_invariant=lambda: False, biases={0: {5: 1.0}})
    for change in (
        {"no_penalties": False}, {"bad_words_token_ids": {0: [[3]]}}, {"allowed_token_ids_mask": torch.ones(1, 4)},
        {"logitsprocs": LogitsProcessors([bias])},
    ):  # fmt: skip
        assert vllm_head.changes(SamplingMetadata(**plain | change)), change


def test_the_calls_of_nccl_are_those_that_vllm_makes():
    import ctypes

    from vllm.distributed.device_communicators import pynccl_wrapper

    theirs = {function.name: function for function in pynccl_wrapper.NCCLLibrary.exported_functions}
    stand_ins = {nccl.UniqueId: pynccl_wrapper.ncclUniqueId}
    stand_ins[ctypes.POINTER(nccl.UniqueId)] = ctypes.POINTER(pynccl_wrapper.ncclUniqueId)
    for name, (result, arguments) in nccl.SIGNATURES.items():
        assert theirs[name].restype is result, name
        assert theirs[name].argtypes == [stand_ins.get(kind, kind) for kind in arguments], name
    assert ctypes.sizeof(nccl.UniqueId) == pynccl_wrapper.NCCL_UNIQUE_ID_BYTES
    for dtype, number in nccl.TYPES.items():
        assert pynccl_wrapper.ncclDataTypeEnum.from_torch(dtype) == number
    assert pynccl_wrapper.ncclRedOpTypeEnum.from_torch(torch.distributed.ReduceOp.SUM) == nccl.SUM


@pytest.fixture
def receiver(monkeypatch):
    """(a client of vLLM's real routes, its real worker with its real NCCL engine, tensors that it loaded).

    What is left out: HTTP's socket, the engine core between them, CUDA, and reloading layer by layer.
    """
    import asyncio

    from fastapi import FastAPI
    from fastapi.testclient import TestClient
    from vllm.config.weight_transfer import WeightTransferConfig
    from vllm.distributed.device_communicators import pynccl
    from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine
    from vllm.entrypoints.rl.online import api_router
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.worker import gpu_worker

    class Joined:
        """vLLM's communicator over queues."""

        def __init__(self, unique, rank, world_size, device):
            self.end = fake_nccl.meet(unique, world_size, rank)

        def broadcast(self, tensor, src, stream=None):
            assert src == 0
            tensor.copy_(self.end.receive(tensor.shape, tensor.dtype))

        def destroy(self):
            pass

    monkeypatch.setattr(pynccl.PyNcclCommunicator, "from_unique_id_bytes", Joined)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
    for name in ("start_weight_update", "finish_weight_update"):
        monkeypatch.setattr(NCCLWeightTransferEngine, name, lambda self: None)
    loaded, versions = [], ["default"]
    parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=0, world_size_across_dp=1)
    config = SimpleNamespace(parallel_config=parallel, model_config=None)
    model = SimpleNamespace(load_weights=lambda pairs: loaded.extend((name, t.clone()) for name, t in pairs))
    worker = object.__new__(gpu_worker.Worker)
    worker.vllm_config, worker.rank = config, 0
    worker.weight_transfer_engine = NCCLWeightTransferEngine(
        WeightTransferConfig(backend="nccl"), config, torch.device("cpu"), model
    )
    worker._weight_update_active = worker._weight_update_is_draft = False
    worker.model_runner = SimpleNamespace(reset_lora_state=lambda: None)

    async def call(method, timeout=None, args=(), kwargs=None):
        return [await asyncio.to_thread(getattr(worker, method), *args, **(kwargs or {}))]

    async def set_version(label):
        versions.append(label)

    llm = object.__new__(AsyncLLM)
    llm.collective_rpc, llm.vllm_config = call, config
    llm.engine_core = SimpleNamespace(set_weight_version_async=set_version, shutdown=lambda timeout=None: None)
    app = FastAPI()
    app.include_router(api_router.router)
    app.state.engine_client = llm
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client, worker, loaded, versions


class Answers:
    """The trainer's end of HTTP, without a socket."""

    address, timeout = "http://here", 20.0

    def __init__(self, client):
        self.client = client

    def ask(self, method, path, body=None):
        answer = self.client.request(method, path, json=body)
        if answer.status_code != 200:
            raise Fault(f"{path} answered {answer.status_code}: {answer.text}")
        return answer.json()


def test_vllms_own_routes_worker_and_engine_take_a_push_by_nccl_twice(receiver, monkeypatch):
    client, worker, loaded, versions = receiver
    monkeypatch.setattr(nccl, "Library", fake_nccl.Library)
    monkeypatch.setattr(nccl, "missing", lambda device: "")
    monkeypatch.setattr(push, "CHUNK", 40)
    with ThreadPoolExecutor(8) as pool:
        transfer = push.Transfer([Answers(client)], pool, torch.device("cpu"), torch.float32)
        for version in (1, 2):
            loaded.clear()
            given = {"a": torch.full((3, 4), float(version)), "b": torch.arange(5), "c": torch.randn(2).bfloat16()}
            transfer.send(iter(given.items()), [version == 2], f"run:{version}")
            assert [name for name, _ in loaded] == ["a", "b", "c"]
            for name, tensor in loaded:
                wanted = given[name].float() if given[name].is_floating_point() else given[name]
                assert tensor.dtype == wanted.dtype
                assert torch.equal(tensor, wanted)
            assert versions[-1] == f"run:{version}"
            assert not worker._weight_update_active
        assert worker.weight_transfer_engine.packed is False
        assert len(fake_nccl.Library.made) == 1
        transfer.close()


def test_vllm_adds_up_one_number_as_soon_as_it_has_joined_and_so_does_the_trainer():
    import inspect

    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator

    joins = inspect.getsource(PyNcclCommunicator._init_comm)
    assert "data = torch.zeros(1, device=device)" in joins
    assert "self.all_reduce(data)" in joins
    assert "self._init_comm(device)" in inspect.getsource(PyNcclCommunicator.from_unique_id_bytes)


def test_vllms_command_line_takes_the_transfer_that_make_serve_asks_for():
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())
    given = parser.parse_args(["--weight-transfer-config", serve.TRANSFER])
    assert given.weight_transfer_config.backend == "nccl"
