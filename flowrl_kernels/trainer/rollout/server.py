"""vLLM in processes of its own, asked over HTTP by a trainer that never imports it (`make serve` starts one).

Prompts go out as token ids, one request each; token ids, log-probabilities and the label of the weights behind every
token come back. Weights go by a folder of safetensors files that the servers can read, or by NCCL (push.py). The paths
are vLLM's own (0.32: `/inference/v1/generate` of `--tokens-only`, `/collective_rpc`, `/reset_prefix_cache`,
`/update_weight_version` and `/weight_info` of VLLM_SERVER_DEV_MODE), and the methods called by them are
`vllm_plugin.WorkerExtension`'s.
"""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.rollout.base import Generated, Sampling
from flowrl_kernels.trainer.rollout.faults import EngineError, Fault, again
from flowrl_kernels.trainer.rollout.http import Http
from flowrl_kernels.trainer.rollout.push import Transfer
from flowrl_kernels.trainer.rollout.responses import Response, draw_seed, look_at, together, vllm_sampling

AT_ONCE = 64  # requests to one server
FILE = 2**31  # bytes of one file of weights, about


class ServerEngine:
    """Prompt number i goes to server i modulo their number; the seed of its responses depends on its number alone.

    A request that fails is tried again, `rollout.retries` times. A server that comes back without the weights gets them
    again: from the folder at once, by NCCL with the next push, so between two pushes it ends the run. All ranks fail
    together, with the same `EngineError`.
    """

    def __init__(self, config: Config, vocab: int, world: World):
        r, self.vocab, self.world = config.rollout, vocab, world
        self.servers = [Http(address, r.timeout) for address in r.servers]
        self.retries, self.dtype = r.retries, parallel.DTYPES[config.parallel.dtype]
        self.head = config.parallel.impl if r.head == "trainer" else ""
        self.root = Path(config.run.dir).resolve() / "weights"
        self.run = parallel.first(lambda: uuid.uuid4().hex[:12], world)
        self.version, self.folder, self.closed = -1, Path(), False
        self.locks = [threading.Lock() for _ in self.servers]
        self.pool = ThreadPoolExecutor(AT_ONCE * len(self.servers), "rollout")
        self.folders = r.push == "folder"
        self.transfer: Transfer | None = None  # rank 0's

        def start() -> None:
            if not self.folders:
                self.transfer = Transfer(self.servers, self.pool, world.device, self.dtype)
            for k in range(len(self.servers)):
                self._again(k, partial(self._label, k))

        parallel.first(start, world)

    # ------------------------------------------------------------------------------------------------ weights

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Rank 0 writes them and has every server load them (the folder before is deleted), or sends them by NCCL."""
        if not self.folders:
            self._send(iter(weights), version)
            return
        folder, before = self.root / f"version_{version}", self.folder
        if self.world.main:
            write(weights, folder, self.dtype)
        else:
            for _ in weights:  # gathering a sharded tensor takes every rank
                pass
        self.version, self.folder = version, folder

        def push() -> None:
            for done in [self.pool.submit(self._again, k, partial(self._load, k)) for k in range(len(self.servers))]:
                done.result()
            if before != folder and before.name:
                shutil.rmtree(before, ignore_errors=True)

        parallel.first(push, self.world)

    def _send(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        before, self.version = self.label, version
        failure: Exception | None = None
        if self.transfer is not None:
            try:
                known = [self._again(k, partial(self._label, k)) == before for k in range(len(self.servers))]
                self.transfer.send(weights, known, self.label)
            except Exception as error:
                failure = error
        for _ in weights:  # gathering a sharded tensor takes every rank, also when rank 0 has given up
            pass

        def settle() -> None:
            if failure is not None:
                raise failure
            for k in range(len(self.servers)):
                self._again(k, partial(self._settle, k))

        parallel.first(settle, self.world)

    def _settle(self, k: int) -> None:
        """The rest of a push by NCCL, which may be tried again; not by a server that has come up since it."""
        self._restore(k)
        self._hook(k)
        self._forget(k)

    def _load(self, k: int) -> None:
        self._hook(k)
        self.servers[k].ask("POST", "/collective_rpc", {"method": "flowrl_load", "args": [str(self.folder)]})
        self._forget(k)
        self.servers[k].ask("POST", "/update_weight_version", {"new_version": self.label})

    def _hook(self, k: int) -> None:
        if self.head:
            self.servers[k].ask("POST", "/collective_rpc", {"method": "flowrl_head", "args": [self.head]})

    def _forget(self, k: int) -> None:
        if self.servers[k].ask("POST", "/reset_prefix_cache") != {"success": True}:
            raise Fault("the prefix cache, which is of old weights, was not emptied")

    def _label(self, k: int) -> str:
        info = self.servers[k].ask("GET", "/weight_info")
        if not isinstance(info, dict) or not isinstance(info.get("weight_version"), str):
            raise Fault(f"GET /weight_info answered {str(info)[:60]}")
        return info["weight_version"]

    @property
    def label(self) -> str:
        """Of the weights pushed last, for all that several runs may ask one server."""
        return f"{self.run}:{self.version}"

    # ------------------------------------------------------------------------------------------------ generation

    def generate(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: list[int] | None = None,
    ) -> Generated:
        return self.ask(prompts, n, sampling, seed, numbers)()

    def ask(
        self,
        prompts: list[list[int]],
        n: int,
        sampling: Sampling,
        seed: int,
        numbers: list[int] | None = None,
    ) -> Callable[[], Generated]:
        """Sends the prompts out. What comes back waits for the responses (every rank calls it) and raises what failed.

        No weights may be pushed before that.
        """
        if not prompts or min(map(len, prompts)) == 0:
            raise ValueError("prompts: wanted at least one prompt of at least one token each")
        asked = numbers if numbers is not None else list(range(len(prompts)))

        def one(i: int) -> list[Response]:
            k = asked[i] % len(self.servers)
            params = vllm_sampling(sampling, n, draw_seed(seed, asked[i]))
            return self._again(k, lambda: self._ask(k, prompts[i], params, sampling))

        under_way = [self.pool.submit(one, i) for i in range(len(prompts))]

        def whole() -> list[Response]:
            try:
                return [response for group in under_way for response in group.result()]
            except CancelledError:  # it was not sent yet
                raise EngineError("the run is over") from None

        def answers() -> Generated:
            return together(parallel.agree(whole, self.world), sampling, self.version)

        return answers

    def _ask(self, k: int, prompt: list[int], params: dict[str, Any], sampling: Sampling) -> list[Response]:
        """A prompt's responses. Raises Fault where one of them is not what was asked for."""
        answer = self.servers[k].ask(
            "POST", "/inference/v1/generate", {"token_ids": prompt, "sampling_params": params, "stream": False}
        )
        responses = read(answer)
        if len(responses) != params["n"]:
            raise Fault(f"{len(responses)} responses came, {params['n']} were asked for")
        if any(set(response.versions) != {self.label} for response in responses):
            self._restore(k)
        for response in responses:
            look_at(response, sampling, self.vocab, self.label)
        return responses

    def _restore(self, k: int) -> None:
        """Pushes to a server that has not got what was pushed last."""
        with self.locks[k]:
            if self._label(k) == self.label:
                return
            if not self.folders:
                raise EngineError(
                    f"rollout.push: {self.servers[k].address} came back without weights {self.version}, and 'nccl' "
                    "gives them with the next push only: go on from the last checkpoint, or use 'folder'"
                )
            self._load(k)

    def _again(self, k: int, action: Callable[[], Any]) -> Any:
        def unless_closed() -> Any:
            if self.closed:
                raise EngineError("the run is over")
            return action()

        return again(unless_closed, retries=self.retries, what=f"rollout.servers: {self.servers[k].address}")

    # ------------------------------------------------------------------------------------------------ the end

    def release(self) -> None:
        """Nothing to do: a server has memory of its own."""

    def close(self) -> None:
        """Whatever is still asked for is given up at once."""
        self.closed = True
        for server in self.servers:
            server.close()
        self.pool.shutdown(wait=False, cancel_futures=True)
        if self.transfer is not None:
            self.transfer.close()
        if self.world.main:
            shutil.rmtree(self.root, ignore_errors=True)


def read(answer: Any) -> list[Response]:
    """The responses of vLLM's answer, in the order of their index. Raises Fault where it has another form."""
    try:
        choices = sorted(answer["choices"], key=lambda choice: choice["index"])
        return [
            Response(
                choice["token_ids"],
                [position["logprob"] for position in choice["logprobs"]["content"]],
                [span["version"] for span in choice["weight_versions"]],
            )
            for choice in choices
        ]
    except (KeyError, TypeError, IndexError) as error:
        raise Fault(f"an answer of another form came ({type(error).__name__} {error}): {str(answer)[:80]}") from None


def write(weights: Iterable[tuple[str, Tensor]], folder: Path, dtype: torch.dtype) -> None:
    """A folder of safetensors files, whole when it has its name."""
    from safetensors.torch import save_file

    partial = folder.with_name(folder.name + ".incomplete")
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    partial.mkdir(parents=True)
    part: dict[str, Tensor] = {}
    size = files = 0

    def save() -> None:
        nonlocal part, size, files
        save_file(part, partial / f"weights-{files:05d}.safetensors")
        part, size, files = {}, 0, files + 1

    for name, tensor in weights:
        # a copy each: tied weights share memory, which the format refuses
        part[name] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None, copy=True).contiguous()
        size += part[name].nbytes
        if size >= FILE:
            save()
    if part:
        save()
    os.rename(partial, folder)
