"""Weights to servers by NCCL: the order of messages and tensors, faults, and the calls of the library itself."""

import ctypes
import json
from contextlib import nullcontext
from types import SimpleNamespace

import fake_nccl
import fake_vllm
import pytest
import tiny
import torch

from flowrl_kernels.trainer import config_file, loop, parallel
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.rollout import Sampling, faults, nccl, push
from flowrl_kernels.trainer.rollout.faults import EngineError
from flowrl_kernels.trainer.rollout.server import ServerEngine

JOIN = ["/shutdown_weight_transfer_engine", "/get_world_size", "/init_weight_transfer_engine"]


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr(fake_nccl.Library, "made", [])
    monkeypatch.setattr(nccl, "Library", fake_nccl.Library)
    monkeypatch.setattr(nccl, "missing", lambda device: "")
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)


@pytest.fixture
def servers():
    fakes = [fake_vllm.of_sums(), fake_vllm.of_sums()]
    yield fakes
    for fake in fakes:
        if fake.server is not None:
            fake.kill()


def engine_of(servers, folder, *more):
    flags = [*fake_vllm.small([fake.address for fake in servers], *more), "--rollout.push", "nccl",
             "--run.dir", str(folder)]  # fmt: skip
    return ServerEngine(config_file.override(Config(), flags), 14, tiny.ALONE)


def weights_of(seed):
    g = torch.Generator().manual_seed(seed)
    wide = torch.randn(6, 4, generator=g)
    return {
        "embed": wide, "head": wide, "turned": torch.randn(3, 5, generator=g).t(),
        "half": torch.randn(7, generator=g).half(), "count": torch.tensor(seed), "one": torch.randn(1, generator=g),
    }  # fmt: skip


def paths(fake):
    return [path for path, _ in fake.told]


def test_every_worker_of_every_server_gets_every_tensor_in_order_at_each_push(servers, tmp_path, monkeypatch):
    monkeypatch.setattr(push, "CHUNK", 100)
    servers[1].workers = 2
    engine = engine_of(servers, tmp_path)
    for version in (1, 2):
        given = weights_of(version)
        engine.update_weights(given.items(), version)
        for fake in servers:
            assert fake.version == engine.label == f"{engine.run}:{version}"
            assert len(fake.received) == version
            assert len(fake.received[-1]) == fake.workers
            for got in fake.received[-1]:
                assert list(got) == list(given)
                for name, tensor in given.items():
                    wanted = tensor.float() if tensor.is_floating_point() else tensor
                    assert got[name].dtype == wanted.dtype
                    assert torch.equal(got[name], wanted), name
    for fake in servers:  # embed and head are 96 bytes each, the rest 60 + 28 + 8 and 4
        assert paths(fake) == [
            *JOIN, *2 * ["/start_weight_update", *2 * ["/update_weights"], "/finish_weight_update"]
        ]  # fmt: skip
        first = next(body["update_info"] for path, body in fake.told if path == "/update_weights")
        assert first == {"names": ["embed", "head"], "dtype_names": ["float32"] * 2, "shapes": [[6, 4]] * 2}
        assert fake.told[2][1]["init_info"]["world_size"] == 1 + fake.workers
    assert len(fake_nccl.Library.made) == 2
    engine.close()
    assert all(group.aborted for group in fake_nccl.Library.made)


def test_what_computes_in_bfloat16_is_sent_so(servers, tmp_path):
    engine = engine_of(servers[:1], tmp_path, "--parallel.dtype", "bfloat16")
    engine.update_weights(weights_of(1).items(), 1)
    (got,) = servers[0].received[0]
    assert torch.equal(got["turned"], weights_of(1)["turned"].bfloat16())
    assert got["count"].dtype == torch.int64
    engine.close()


def test_the_weights_are_the_folders_and_so_are_the_responses(servers, tmp_path):
    given = {name: 0.5 * tensor for name, tensor in servers[0].engine.policy.model.state_dict().items()}
    asked = [[3, 13], [4, 5, 13]], 2, Sampling(6, 1.0, (1,)), 7
    engine = engine_of(servers[:1], tmp_path)
    flags = [*fake_vllm.small(servers[1].address), "--run.dir", str(tmp_path)]
    other = ServerEngine(config_file.override(Config(), flags), 14, tiny.ALONE)
    for each in (engine, other):
        each.update_weights(given.items(), 1)
    one, two = engine.generate(*asked), other.generate(*asked)
    assert all(torch.equal(a, b) for a, b in zip(one[:4], two[:4]))
    assert servers[1].loads == 1
    assert not servers[1].told
    engine.close()
    other.close()


def test_a_server_that_was_away_between_two_pushes_joins_anew(servers, tmp_path):
    engine = engine_of(servers, tmp_path)
    engine.update_weights(weights_of(1).items(), 1)
    servers[1].kill()
    servers[1].start()
    engine.update_weights(weights_of(2).items(), 2)
    assert [paths(fake).count("/init_weight_transfer_engine") for fake in servers] == [1, 2]
    assert torch.equal(servers[1].received[-1][0]["embed"], weights_of(2)["embed"])
    assert len({body["init_info"]["nccl_unique_id_b64"] for fake in servers for path, body in fake.told
                if path == "/init_weight_transfer_engine"}) == 3  # fmt: skip
    engine.close()


def test_a_server_that_lost_the_weights_after_a_push_ends_the_run_by_name(servers, tmp_path):
    engine = engine_of(servers[:1], tmp_path)
    given = servers[0].engine.policy.model.state_dict()
    engine.update_weights(given.items(), 1)
    servers[0].kill()
    servers[0].start()
    with pytest.raises(EngineError, match=rf"rollout\.push: {servers[0].address} came back without weights 1"):
        engine.generate([[3, 13]], 1, Sampling(6, 1.0, (1,)), 7)
    engine.close()


def test_a_server_that_comes_up_again_before_the_push_is_done_does_not_pass_for_one_that_has_it(servers, tmp_path):
    engine = engine_of(servers[:1], tmp_path)
    finish, fake = fake_vllm.TRANSFER["/finish_weight_update"], servers[0]

    def finish_and_die(self, **body):
        answer = finish(self, **body)
        self.version = "default"
        return answer

    fake_vllm.TRANSFER["/finish_weight_update"] = finish_and_die
    try:
        with pytest.raises(EngineError, match="came back without weights 4"):
            engine.update_weights(weights_of(1).items(), 4)
    finally:
        fake_vllm.TRANSFER["/finish_weight_update"] = finish
    assert fake.version == "default"
    engine.close()


@pytest.mark.parametrize("path", ["/init_weight_transfer_engine", "/start_weight_update", "/update_weights"])
def test_a_push_that_breaks_off_is_named_at_once_and_every_tensor_is_still_gathered(servers, tmp_path, path):
    engine = engine_of(servers, tmp_path, "--rollout.timeout", "60")
    engine.update_weights(weights_of(1).items(), 1)
    good = fake_vllm.TRANSFER[path]
    if path == "/init_weight_transfer_engine":
        servers[1].version = "of somebody else"

    def fails(self, **body):
        if self is servers[1]:
            raise RuntimeError("no memory")
        return good(self, **body)

    fake_vllm.TRANSFER[path] = fails
    gathered = []
    try:
        with pytest.raises(EngineError, match=rf"rollout\.push: {servers[1].address}: POST {path} .*no memory.*once"):
            engine.update_weights(((gathered.append(n), (n, t))[1] for n, t in weights_of(2).items()), 2)
    finally:
        fake_vllm.TRANSFER[path] = good
    assert gathered == list(weights_of(2))
    assert fake_nccl.Library.made[0].aborted or fake_nccl.Library.made[1].aborted
    engine.close()


def test_workers_that_never_come_are_waited_for_no_longer_than_rollout_timeout(servers, tmp_path, monkeypatch):
    engine = engine_of(servers[:1], tmp_path, "--rollout.timeout", "0.3")
    monkeypatch.setitem(fake_vllm.TRANSFER, "/init_weight_transfer_engine", lambda fake, init_info: {})
    with pytest.raises(EngineError, match=r"its workers in NCCL did not come within 0\.3 seconds"):
        engine.update_weights(weights_of(1).items(), 1)
    engine.close()


def test_the_other_ranks_gather_and_send_nothing(servers, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "first", lambda action, world: "the run's")
    flags = [*fake_vllm.small(servers[0].address), "--rollout.push", "nccl", "--run.dir", str(tmp_path)]
    engine = ServerEngine(config_file.override(Config(), flags), 14, World(1, 2, torch.device("cpu"), None))
    weights = iter(weights_of(1).items())
    engine.update_weights(weights, 1)
    assert next(weights, None) is None
    assert (engine.version, servers[0].told, fake_nccl.Library.made) == (1, [], [])
    engine.close()


def test_a_type_that_nccl_does_not_send_is_refused_by_the_tensors_name(servers, tmp_path):
    engine = engine_of(servers[:1], tmp_path)
    with pytest.raises(EngineError, match=r"rollout\.push: .*NCCL does not send mask, a torch\.bool"):
        engine.update_weights([("mask", torch.ones(3, dtype=torch.bool))], 1)
    engine.close()


@pytest.mark.nightly
def test_a_run_by_nccl_is_the_run_by_a_folder(servers, tmp_path):
    losses = []
    for fake, way in zip(servers, ("folder", "nccl")):
        flags = [*fake_vllm.small(fake.address), "--rollout.push", way, "--run.dir", str(tmp_path / way)]
        loop.train(config_file.override(Config(), flags))
        lines = [json.loads(line) for line in (tmp_path / way / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[0] == losses[1]
    assert len(losses[0]) == len(servers[1].received) - 1 == 3  # and before step 0
    assert paths(servers[1]).count("/init_weight_transfer_engine") == 1
    assert (servers[0].loads, servers[1].loads) == (4, 0)


# ------------------------------------------------------------------------------------------------ the library


@pytest.fixture
def binding(monkeypatch):
    """(the real Library over Python functions that ctypes calls as it would C's, what they were called with)."""
    monkeypatch.undo()
    calls = []

    def new_id(at):
        at.contents.internal[:] = [i - 64 for i in range(128)]
        return 0

    def join(handle, size, unique, rank):
        calls.append(("join", size, bytes(unique), rank))
        handle[0] = 4321
        return 0

    def add(source, target, count, kind, op, handle, stream):
        calls.append(("add", ctypes.string_at(source, 4 * count), source == target, kind, op, handle, stream))
        return 0

    def cast(source, target, count, kind, root, handle, stream):
        calls.append(("cast", ctypes.string_at(source, 2 * count), source == target, kind, root, handle, stream))
        return 0

    made = object.__new__(nccl.Library)
    made.lib = SimpleNamespace(ncclGetErrorString=lambda status: b"invalid usage")
    for name, call in {
        "ncclGetUniqueId": new_id, "ncclCommInitRank": join, "ncclAllReduce": add, "ncclBroadcast": cast,
        "ncclCommAbort": lambda handle: calls.append(("abort", handle)) or 5,
    }.items():  # fmt: skip
        result, arguments = nccl.SIGNATURES[name]
        setattr(made.lib, name, ctypes.CFUNCTYPE(result, *arguments)(call))
    stream = SimpleNamespace(cuda_stream=77, synchronize=lambda: calls.append("wait"), wait_stream=calls.append)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "after what made the tensors")
    monkeypatch.setattr(torch.cuda, "Stream", lambda: stream)
    return made, calls


def test_the_calls_are_nccls_with_ids_by_value_and_the_tensors_own_bytes(binding):
    library, calls = binding
    unique = library.unique_id()
    assert unique == bytes((i - 64) % 256 for i in range(128))
    group = library.join(unique, 3, torch.device("cpu"))
    assert calls == [("join", 3, unique, 0), ("add", bytes(4), True, 7, 0, 4321, 77), "wait"]
    calls.clear()
    tensors = [torch.tensor([1.0, -2.0]).bfloat16(), torch.tensor([[0.5]]).half()]
    group.send(tensors)
    assert calls == [
        "after what made the tensors", ("cast", b"\x80\x3f\x00\xc0", True, 9, 0, 4321, 77),
        ("cast", b"\x00\x38", True, 6, 0, 4321, 77), "wait",
    ]  # fmt: skip
    with pytest.raises(nccl.NcclError, match=r"ncclCommAbort: invalid usage \(5\)"):
        group.abort()
    assert calls[-1] == ("abort", 4321)


def test_what_is_no_nccl_is_refused_by_name(monkeypatch):
    monkeypatch.undo()
    with pytest.raises(nccl.NcclError, match=r"libnowhere\.so: "):
        nccl.Library("libnowhere.so")
    with pytest.raises(nccl.NcclError, match=r"libc\.so\.6: .*ncclGetErrorString"):
        nccl.Library("libc.so.6")
    assert nccl.missing("cpu") == "the trainer runs on a CPU"
    with pytest.raises(EngineError, match="rollout.push: wanted 'folder', the trainer runs on a CPU; got 'nccl'"):
        push.Transfer([], None, torch.device("cpu"), torch.float32)
