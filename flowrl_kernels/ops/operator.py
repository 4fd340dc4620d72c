"""How this library's operators are registered with PyTorch: one decorator, used like `torch.library.custom_op`.

It differs in four ways. The first call does not import torch's compiler (sympy, triton, profilers: 157 MB that an eager
user never needs). Autocast ends at the door, in a backward that runs inside it too. Forward mode is refused,
where `custom_op` drops the tangent in silence. And a second derivative is refused by the operator's name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

NAMESPACE = "flowrl"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def missing(name: str, what: str) -> NotImplementedError:
    return NotImplementedError(
        f"{name}: {what} is not implemented, only a first backward is; impl='reference' is plain torch and has it "
        "(for the log-prob primitives)"
    )


def refuse_forward_mode(name: str, *values: Any) -> None:
    """Raise if a tensor carries a tangent, which the operator would lose."""
    if forward_ad._current_level < 0:
        return
    for value in values:
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise missing(name, "forward-mode differentiation (torch.func.jvp, torch.autograd.forward_ad)")


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with autocast off on the device of its first tensor: inside, it would round fp32 products."""

    def run(*arguments: Any) -> Any:
        device = next(value.device.type for value in arguments if isinstance(value, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*arguments)
        with torch.autocast(device, enabled=False):
            return function(*arguments)

    return run


class Operator:
    """A registered operator: call it, or register its fake and its backward."""

    def __init__(self, function: Callable[..., Any], name: str, mutates_args: tuple[str, ...]):
        self.name = name
        schema = torch.library.infer_schema(function, mutates_args=mutates_args)
        _LIBRARY.define(name + schema)
        _LIBRARY.impl(name, without_autocast(function), "CompositeExplicitAutograd")
        self.overload = getattr(getattr(torch.ops, NAMESPACE), name).default
        self.mutated = [i for i, a in enumerate(self.overload._schema.arguments) if a.name in mutates_args]
        if self.mutated:
            _LIBRARY.impl(name, self._count_versions, "ADInplaceOrView", with_keyset=True)
        self._autograd = make_autograd_impl(self.overload, Info(self._no_second_backward, None))
        _LIBRARY.impl(name, self._dispatch_autograd, "Autograd", with_keyset=True)

    def __call__(self, *arguments: Any) -> Any:
        return self.overload(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        torch.library.register_fake(f"{NAMESPACE}::{self.name}", function, lib=_LIBRARY)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
        self._autograd = make_autograd_impl(self.overload, Info(backward, setup_context))

    def _dispatch_autograd(self, keyset: Any, *arguments: Any) -> Any:
        refuse_forward_mode(self.name, *arguments)
        if torch._C._are_functorch_transforms_active() and torch.is_grad_enabled():
            if any(isinstance(value, Tensor) and value.requires_grad for value in arguments):
                raise missing(self.name, "a gradient under a torch.func transform")
        return self._autograd(keyset, *arguments)

    def _count_versions(self, keyset: Any, *arguments: Any) -> Any:
        for i in self.mutated:
            if arguments[i] is not None:
                torch.autograd.graph.increment_version(arguments[i])
        with torch._C._AutoDispatchBelowADInplaceOrView():
            return self.overload.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *arguments)

    def _no_second_backward(self, *_: Any) -> None:
        raise missing(self.name.removesuffix("_").removesuffix("_bwd"), "a second derivative")


def operator(name: str, *, mutates_args: tuple[str, ...]) -> Callable[[Callable[..., Any]], Operator]:
    """`torch.library.custom_op` as this library wants it; `name` is "flowrl::..." and the schema the annotations'."""
    return lambda function: Operator(function, name.removeprefix(NAMESPACE + "::"), mutates_args)


class OnceDifferentiable(torch.autograd.Function):
    """An autograd function with a first backward and nothing more, and says so. Subclasses set `name`."""

    name = ""

    @classmethod
    def call(cls, *arguments: Any) -> Any:
        refuse_forward_mode(cls.name, *arguments)
        if torch._C._are_functorch_transforms_active():
            raise missing(cls.name, "a torch.func transform")
        return cls.apply(*arguments)


def first_backward_only(name: str, gradients: tuple[Any, ...], *sources: Tensor | None) -> tuple[Any, ...]:
    """The gradients, made without a graph from `sources`; where a graph is asked for, going through it raises."""
    if not torch.is_grad_enabled():
        return gradients
    places = [i for i, g in enumerate(gradients) if g is not None]
    out = list(gradients)
    barred = _Bar.apply(name, len(places), *(gradients[i].detach() for i in places), *sources)
    for i, gradient in zip(places, barred):
        out[i] = gradient
    return tuple(out)


class _Bar(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, count: int, *tensors: Tensor | None) -> tuple[Any, ...]:
        ctx.name = name
        return tuple(g.view_as(g) for g in tensors[:count] if g is not None)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise missing(ctx.name, "a second derivative")
