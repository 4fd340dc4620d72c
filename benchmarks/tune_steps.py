"""Times what the bounded backward and the single pass choose on this GPU; a part of `python -m benchmarks.tune`.

Neither is adopted by itself: the tile width, the share of blocks above which the exact backward is taken and the chunk
of the single pass are constants of flowrl_kernels/triton/bounded.py and flowrl_kernels/ops/linear_residual.py, for
whoever revises those.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from unittest import mock

import torch

from benchmarks import inputs, measure
from benchmarks.cases import HEADS, Case

COLUMNS = (512, 1024, 2048)
EPSILONS = (1e-4, 1e-3, 1e-2)  # many pairs to few: where the exact backward is as fast is the share to fall back at
BUFFERS = (1 << 28, 1 << 29, 1 << 30)  # logits of one chunk


def _timed(run: Callable[[], object], clock: measure.Clock, repeats: int) -> dict:
    try:
        clock(run)
        times = [clock(run)[0] * 1e3 for _ in range(repeats)]
    except Exception as error:  # out of memory, say
        return {"error": f"{type(error).__name__}: {str(error)[:200]}"}
    return {"median_ms": sorted(times)[len(times) // 2], "repeats_ms": times}


def _late(deadline: float) -> bool:
    return time.monotonic() > deadline


def bounded(case: Case, device: str, repeats: int, deadline: float, impl: str = "triton") -> dict:
    """The exact backward of `case`, then the bounded one by tile width and epsilon, never falling back."""
    from flowrl_kernels import linear_logprob
    from flowrl_kernels.triton import bounded as room

    made = inputs.make(case, device, 0)
    x, w = made.hidden.requires_grad_(), made.weight.requires_grad_()
    report, clock = torch.zeros(3, device=device), measure.Clock(device)

    def backward(epsilon: float) -> dict:
        logp = linear_logprob(x, w, made.target, epsilon=epsilon, report=report, impl=impl).logp
        taken = _timed(lambda: torch.autograd.grad(logp, (x, w), made.grad_logp, retain_graph=True), clock, repeats)
        return {"epsilon": epsilon, **taken}

    runs = [backward(0.0)]
    for columns in COLUMNS:
        for epsilon in EPSILONS:
            if _late(deadline):
                break
            with mock.patch.object(room, "COLUMNS", columns), mock.patch.object(room, "FALL_BACK", 1.0):
                entry = {"columns": columns, **backward(epsilon)}
            bound, share, fell_back = report.tolist()
            runs.append({**entry, "bound": bound, "share_of_pairs": share, "fell_back": bool(fell_back)})
    return {"case": case.record(), "default": {"columns": room.COLUMNS, "fall_back": room.FALL_BACK}, "backward": runs}


def single_pass(case: Case, device: str, repeats: int, deadline: float, impl: str = "triton") -> dict:
    """A whole step of `case` by LinearFlowRLLoss: two passes, then one by the size of a chunk's logits."""
    from benchmarks.peers.ours import _loss
    from flowrl_kernels.core import passes as room

    made, clock = inputs.make(case, device, 0), measure.Clock(device)
    leaves = [made.hidden.requires_grad_(), made.weight.requires_grad_()]

    def step(once: bool) -> dict:
        loss = _loss(impl, once)
        return _timed(lambda: torch.autograd.grad(loss(case, made).loss, leaves), clock, repeats)

    name = "BUFFER" if device == "cpu" else "GPU_BUFFER"
    runs = [{"passes": 2, **step(False)}]
    for buffer in BUFFERS:
        if _late(deadline):
            break
        with mock.patch.object(room, name, buffer):
            runs.append({"passes": 1, "buffer": buffer, **step(True)})
    return {"case": case.record(), "default": {"buffer": getattr(room, name)}, "step": runs}


def cases(tokens: int) -> tuple[Case, Case]:
    """What is timed on a GPU: the RL-like batch of the bounded bar, the head of the single-pass bar."""
    h, v = HEADS["qwen2.5-7b"]
    rl = Case("tune-bounded", "linear_logprob", "cuda", tokens, h, v, dtype="bf16", level="rl", sequences=tokens // 64)
    h, v = HEADS["llama-3.1-8b"]
    return rl, Case("tune-single-pass", "flowrl_loss", "cuda", tokens, h, v, dtype="bf16", sequences=tokens // 1024)
