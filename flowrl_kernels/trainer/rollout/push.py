"""Weights to servers by vLLM's weight transfer protocol, over NCCL (vllm/distributed/weight_transfer, 0.32).

One communicator a server: the trainer's rank 0 is rank 0, the server's workers are ranks 1 to n (tensor parallel ranks
within data parallel ones, as vLLM counts them). The unique id is made here and goes to the server in the request that
has its workers join, so nothing that comes from elsewhere is unpickled. Then, at each push: start, any number of
requests that name some tensors, whose values follow by broadcast in that order, and finish.
"""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowrl_kernels.trainer.rollout import nccl
from flowrl_kernels.trainer.rollout.faults import EngineError, Fault
from flowrl_kernels.trainer.rollout.http import Http

T = TypeVar("T")
CHUNK = 2**30  # bytes of the tensors of one request, about
GRACE = 5.0  # seconds


class Transfer:
    """The trainer's end, on its rank 0 alone. A failure ends the run: half of the weights may have arrived.

    Raises EngineError where there is no CUDA device or no NCCL.
    """

    def __init__(self, servers: list[Http], pool: ThreadPoolExecutor, device: torch.device, dtype: torch.dtype):
        self.servers, self.pool, self.device, self.dtype = servers, pool, device, dtype
        why = nccl.missing(device.type)
        if why:
            raise EngineError(f"rollout.push: wanted 'folder', {why}; got 'nccl'")
        self.library = nccl.Library()
        self.groups: dict[int, nccl.Communicator] = {}

    def send(self, weights: Iterator[tuple[str, Tensor]], known: list[bool], label: str) -> None:
        """All of `weights` to every server, which they have loaded by then.

        Args:
            known: of each server, whether it still has the last push's weights. One that has not joins anew.
            label: the servers' label for these weights.

        Raises:
            EngineError: a server failed, refused or took longer than `rollout.timeout`; names it.
        """
        self._each(lambda k: self._begin(k, known[k]))
        for chunk in chunks(weights, self.dtype, self.device):
            self._each(partial(self._chunk, chunk))
        self._each(lambda k: self.servers[k].ask("POST", "/finish_weight_update", {"weight_version": label}))

    def close(self) -> None:
        for k in list(self.groups):
            self._leave(k)

    def _each(self, action: Callable[[int], Any]) -> None:
        """`action(k)` of every server k, all at once."""

        def one(k: int) -> None:
            try:
                action(k)
            except (OSError, Fault, nccl.NcclError) as error:
                self._leave(k)  # whoever still waits in it returns
                why = str(error) or type(error).__name__
                once = "a push that broke off is not sent again"
                raise EngineError(f"rollout.push: {self.servers[k].address}: {why} (tried once: {once})") from error

        for done in [self.pool.submit(one, k) for k in range(len(self.servers))]:
            done.result()

    def _begin(self, k: int, known: bool) -> None:
        server = self.servers[k]
        if not known or k not in self.groups:
            self._leave(k)
            server.ask("POST", "/shutdown_weight_transfer_engine")  # of a trainer before this one
            size = 1 + workers(server.ask("GET", "/get_world_size"))
            unique = self.library.unique_id()
            body = {"nccl_unique_id_b64": base64.b64encode(unique).decode(), "rank_offset": 1, "world_size": size}
            asked = self._ask(k, "/init_weight_transfer_engine", {"init_info": {**body, "packed": False}})
            joins = partial(self.library.join, unique, size, self.device)
            self.groups[k] = meet(joins, asked, server.timeout)
        server.ask("POST", "/start_weight_update")

    def _chunk(self, chunk: list[tuple[str, Tensor]], k: int) -> None:
        info = {
            "names": [name for name, _ in chunk],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
            "shapes": [list(tensor.shape) for _, tensor in chunk],
        }
        asked = self._ask(k, "/update_weights", {"update_info": info})
        meet(partial(self.groups[k].send, [tensor for _, tensor in chunk]), asked, self.servers[k].timeout)

    def _ask(self, k: int, path: str, body: Any) -> Future[Any]:
        return self.pool.submit(self.servers[k].ask, "POST", path, body)

    def _leave(self, k: int) -> None:
        group = self.groups.pop(k, None)
        if group is not None:  # NCCL may wait for kernels first: not for longer than this
            ending = threading.Thread(target=group.abort, name="nccl", daemon=True)
            ending.start()
            ending.join(GRACE)


def meet(action: Callable[[], T], asked: Future[Any], timeout: float) -> T:
    """`action()`, which waits for workers that the request `asked` sends to it.

    NCCL has no time limit, so it waits in a thread of its own, which is left alone when the request fails.

    Raises:
        What either of them raised, or TimeoutError after `timeout` seconds.
    """
    mine: Future[T] = Future()

    def run() -> None:
        try:
            mine.set_result(action())
        except BaseException as error:
            mine.set_exception(error)

    threading.Thread(target=run, name="nccl", daemon=True).start()
    wait([asked, mine], timeout, FIRST_EXCEPTION)
    for each in (asked, mine):
        if each.done():
            each.result()
    if not (asked.done() and mine.done()):
        late = "the server's answer" if mine.done() else "its workers in NCCL"
        raise TimeoutError(f"{late} did not come within {timeout:g} seconds")
    return mine.result()


def workers(answer: Any) -> int:
    """Of a server, by its answer to /get_world_size. Raises Fault where that has another form."""
    size = answer.get("world_size") if isinstance(answer, dict) else None
    if not isinstance(size, int) or size < 1:
        raise Fault(f"GET /get_world_size answered {str(answer)[:60]}")
    return size


def chunks(
    weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: torch.device
) -> Iterator[list[tuple[str, Tensor]]]:
    """The tensors in their order, contiguous on `device`, floating ones as `dtype`; about CHUNK bytes at a time.

    Raises:
        EngineError: one has a type that NCCL does not send.
    """
    part: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        sent = tensor.detach().to(device, dtype if tensor.is_floating_point() else None).contiguous()
        if sent.dtype not in nccl.TYPES:
            raise EngineError(f"rollout.push: wanted 'folder', NCCL does not send {name}, a {sent.dtype}; got 'nccl'")
        part.append((name, sent))
        size += sent.nbytes
        if size >= CHUNK:
            yield part
            part, size = [], 0
    if part:
        yield part
