"""One adapter file per peer. An adapter that cannot run says why; none is dropped in silence."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import HEAD_OPS, Case
from benchmarks.inputs import Inputs

FILES = ("ours", "eager", "compiled", "torch_core", "liger", "cce", "trl", "verl", "quack", "rl_kernel")


@dataclass
class Outcome:
    """What one run gave; None for what the implementation does not produce or was not asked for."""

    logp: Tensor | None = None  # [N]
    entropy: Tensor | None = None  # [N]
    loss: Tensor | None = None  # scalar, mean of -logp
    dx: Tensor | None = None  # [N, H]; [N, V] for "logprob"; [B, T] for "residual"
    dw: Tensor | None = None  # [V, H]
    report: Tensor | None = None  # [3] bound, share of tiles computed, 1 if it fell back (bounded backward)

    def bytes(self) -> int:
        """Outputs and gradients: what every implementation must hand back, so no part of its extra memory."""
        return sum(t.numel() * t.element_size() for t in (self.logp, self.entropy, self.dx, self.dw) if t is not None)


@dataclass(frozen=True)
class Peer:
    """One implementation under test.

    forward: (case, inputs) -> Outcome with the differentiable logp (or loss) and entropy.
    available: device -> (can it run here, reason or description).
    ops: the operations it does. per_token: takes a gradient per token and returns log-probs; a peer that only has a
    mean loss gets -1/N everywhere and its own float64 answer. grads_in_forward: its forward already does the
    backward's work, so a forward time next to others' would mislead and none is taken.
    refuse: case -> the reason it cannot run this one, or None. warm: run once in full before memory is measured
    (compilers). step: replaces the default forward + autograd where the peer is a whole loss.
    """

    name: str
    forward: Callable[[Case, Inputs], Outcome]
    available: Callable[[str], tuple[bool, str]]
    ops: tuple[str, ...] = ("linear_logprob",)
    per_token: bool = True
    grads_in_forward: bool = False
    recompute: bool = True
    refuse: Callable[[Case], str | None] = lambda case: None
    warm: bool = False
    package: str | None = None
    note: str = ""
    step: Callable[[Case, Inputs], Outcome] | None = None

    def version(self) -> str | None:
        return version_of(self.package) if self.package else None

    def usable(self, device: str) -> tuple[bool, str]:
        """`available`, with a package that breaks while being looked at counted as a reason."""
        try:
            return self.available(device)
        except Exception as error:
            return False, f"{type(error).__name__}: {error}"

    def refusal(self, case: Case) -> str | None:
        if case.op not in self.ops:
            return f"does not do {case.op}"
        return self.refuse(case)

    def run(self, case: Case, inputs: Inputs, backward: bool) -> Outcome:
        """One forward without gradients, or one forward and backward on fresh leaves; the inputs stay as they are."""
        if not backward:
            with torch.no_grad():
                return self.forward(case, inputs)
        if self.step is not None:
            return self.step(case, inputs)
        return differentiate(self, case, inputs)


def differentiate(peer: Peer, case: Case, inputs: Inputs) -> Outcome:
    """Forward and autograd with the case's gradient per token. Scalar losses: their mean with gradient 1."""
    if case.op in HEAD_OPS:
        hidden = inputs.hidden.detach().requires_grad_()
        weight = inputs.weight.detach().requires_grad_(case.train_head)
        own = Inputs(**{**inputs.__dict__, "hidden": hidden, "weight": weight})
        leaves = [hidden, weight] if case.train_head else [hidden]
    else:
        logits = inputs.logits.detach().requires_grad_()
        own = Inputs(**{**inputs.__dict__, "logits": logits})
        leaves = [logits]
    outcome = peer.forward(case, own)
    if outcome.loss is not None:
        grads = torch.autograd.grad(outcome.loss, leaves)
    else:
        values, upstream = [outcome.logp], [inputs.grad_logp.to(outcome.logp.dtype)]
        if case.entropy:
            values.append(outcome.entropy)
            upstream.append(inputs.grad_entropy.to(outcome.entropy.dtype))
        grads = torch.autograd.grad(values, leaves, upstream)
    return Outcome(
        logp=None if outcome.logp is None else outcome.logp.detach(),
        entropy=None if outcome.entropy is None else outcome.entropy.detach(),
        loss=None if outcome.loss is None else outcome.loss.detach(),
        dx=grads[0],
        dw=grads[1] if len(grads) > 1 else None,
        report=outcome.report,
    )


def always(device: str) -> tuple[bool, str]:
    return True, "plain torch"


def installed(module: str, package: str) -> tuple[bool, str]:
    """Whether a top-level module is there, without importing it."""
    if importlib.util.find_spec(module) is None:
        return False, f"{package} is not installed"
    return True, f"{package} {version_of(package) or '(no version)'}"


def needs_cuda(device: str, here: tuple[bool, str]) -> tuple[bool, str]:
    if here[0] and device != "cuda":
        return False, f"{here[1]} is installed; its kernels need a CUDA GPU"
    return here


def imports(module: str, attribute: str) -> tuple[Any | None, str]:
    """An attribute of a module, or None and the reason; a package that breaks while importing is a reason too."""
    try:
        return getattr(importlib.import_module(module), attribute), ""
    except Exception as error:
        return None, f"{module}.{attribute} does not import: {type(error).__name__}: {error}"


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load() -> dict[str, Peer]:
    """Every adapter by name, in the order of `FILES`."""
    peers: dict[str, Peer] = {}
    for file in FILES:
        for peer in importlib.import_module(f"benchmarks.peers.{file}").PEERS:
            peers[peer.name] = peer
    return peers
