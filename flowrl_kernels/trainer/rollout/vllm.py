"""vLLM in this process: one engine for each group of ranks that holds the model together, fed by the trainer itself."""

from __future__ import annotations

import contextlib
import copy
import os
import random
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.rollout.base import Generated, Sampling
from flowrl_kernels.trainer.rollout.faults import EngineError, Fault
from flowrl_kernels.trainer.rollout.responses import Response, draw_seed, look_at, together, vllm_sampling
from flowrl_kernels.trainer.rollout.vllm_plugin import EXTENSION, register

SETTINGS = {  # of vLLM, unless somebody set them: in this process, no news sent out, threads left where they are
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


@contextlib.contextmanager
def left_alone() -> Iterator[None]:
    """What vLLM changes of a process when it starts is put back: thread counts and their setter, random generators."""
    setter, threads = torch.set_num_threads, torch.get_num_threads()
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        torch.set_num_threads = setter
        torch.set_num_threads(threads)
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda:
            torch.cuda.set_rng_state_all(cuda)


class VLLMEngine:
    """Starts on random weights; nothing is right before the first `update_weights`.

    On CUDA it sleeps from `release` to `update_weights`, so the optimiser has the memory. With `tensor_parallel` ranks
    to an engine each of them sees the group's prompts and keeps its own responses.
    """

    def __init__(self, config: Config, model: Any, world: World):
        r, self.world, self.vocab = config.rollout, world, model.config.get_text_config().vocab_size
        self.group, self.version, self.cuda = r.tensor_parallel, -1, world.device.type == "cuda"
        self.asleep = False
        for name, value in SETTINGS.items():
            os.environ.setdefault(name, value)
        folder = tempfile.mkdtemp(prefix="flowrl-vllm-")
        try:
            save_shape(model.config, type(model).__name__, folder)
            with by_name("does not start with this model"), left_alone():
                self.llm: Any = self._start(config, folder)
                if r.head == "trainer":
                    self.llm.collective_rpc("flowrl_head", args=(config.parallel.impl,))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _start(self, config: Config, folder: str) -> Any:
        import vllm

        register()
        r = config.rollout
        return vllm.LLM(
            model=folder,
            skip_tokenizer_init=True,
            trust_remote_code=config.model.trust_remote_code,
            load_format="dummy",  # the trainer's weights come before the first prompt
            dtype=config.parallel.dtype,
            seed=0,
            logprobs_mode="processed_logprobs",  # after the temperature: of the distribution that was drawn from
            generation_config="vllm",
            tensor_parallel_size=r.tensor_parallel,
            distributed_executor_backend="external_launcher" if "RANK" in os.environ else None,  # torchrun's
            kv_cache_memory_bytes=int(r.kv_cache * 2**30),
            max_num_seqs=min(r.batch, r.prompts * r.samples),
            enforce_eager=not self.cuda,
            enable_sleep_mode=self.cuda,
            worker_extension_cls=EXTENSION,
        )

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Loads them where they are, through vLLM's layer-wise reload, which packs and shards as at the start."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        pairs = list(weights) if self.group == 1 and self.world.size == 1 else weights
        with by_name("does not take the weights"):
            self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": pairs})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise EngineError("rollout.engine: vLLM kept its prefix cache, which is of old weights")
        self.version = version
        self.llm.llm_engine.set_weight_version(str(version))

    @torch.no_grad()
    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: list[int] | None = None,
    ) -> Generated:
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("prompts: wanted at least one prompt of at least one token each")
        numbers = numbers if numbers is not None else list(range(len(prompts)))
        mine = slice(0, len(prompts))
        if self.group > 1:
            first = self.world.rank - self.world.rank % self.group
            shares = parallel.gather((prompts, numbers), self.world)[first : first + self.group]
            before = sum(len(share[0]) for share in shares[: self.world.rank - first])
            mine = slice(before, before + len(prompts))
            prompts = [prompt for share in shares for prompt in share[0]]
            numbers = [number for share in shares for number in share[1]]
        from vllm import SamplingParams

        asked = [SamplingParams(**vllm_sampling(sampling, n, draw_seed(seed, number))) for number in numbers]
        with by_name("does not generate"):
            outputs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
        responses = [response_of(choice) for output in outputs[mine] for choice in output.outputs]
        if len(responses) != len(prompts[mine]) * n:
            raise EngineError(f"rollout.engine: vLLM gave {len(responses)} of {len(prompts[mine]) * n} responses")
        try:
            for response in responses:
                look_at(response, sampling, self.vocab, str(self.version))
        except Fault as fault:
            raise EngineError(f"rollout.engine: vLLM: {fault}") from fault
        return together(responses, sampling, self.version)

    def release(self) -> None:
        """Sleeps: weights and cache are dropped, for new ones come with the next `update_weights`."""
        if self.cuda:
            self.llm.sleep(level=2)
            self.asleep = True

    def close(self) -> None:
        engine = self.llm.llm_engine.engine_core
        engine.shutdown()


def response_of(choice: Any) -> Response:
    """vLLM's CompletionOutput."""
    tokens = list(choice.token_ids)
    logp = [position[token].logprob for position, token in zip(choice.logprobs or [], tokens)]
    return Response(tokens, logp, sorted({span.version for span in choice.weight_versions or []}))


def save_shape(shape: Any, architecture: str, folder: str) -> None:
    """The config.json by which vLLM builds the model; no weights."""
    shape = copy.deepcopy(shape)
    shape.architectures = [architecture]
    shape.save_pretrained(folder)


@contextlib.contextmanager
def by_name(what: str) -> Iterator[None]:
    """An EngineError that says what vLLM does not do, and its own first line on why."""
    try:
        yield
    except Exception as error:
        raise EngineError(f"rollout.engine: vLLM {what}: {_cause(error)}") from error


def _cause(error: BaseException) -> str:
    """The first line of what was at the bottom of it."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
