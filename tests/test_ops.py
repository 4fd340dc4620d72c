"""The operators keep PyTorch's contract: schemas, fakes, autograd, and no graph break under torch.compile."""

import pytest
import torch

from flowrl_kernels import linear_logprob, logprob
from flowrl_kernels.ops.linear_logprob import linear_logprob as linear_op
from flowrl_kernels.ops.logprob import logprob as logits_op
from flowrl_kernels.testing import peaked_inputs


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize(("epsilon", "several"), [(0.0, False), (0.01, False), (0.0, True)])
def test_linear_logprob_passes_opcheck(entropy, epsilon, several):
    hidden, weight, target = peaked_inputs(7, 8, 130)
    more: tuple = ()
    if several:
        target, more = torch.stack([target, target * 0 - 100, target // 2], 1), (0.0, 0, None, None, "", True)
    bias = torch.zeros(130, requires_grad=True)
    arguments = (
        hidden.requires_grad_(), weight.requires_grad_(), target, bias, torch.ones(1), 1.0, None, -100, entropy,
        epsilon, None, None, "chunked", *more,
    )  # fmt: skip
    torch.library.opcheck(linear_op.overload, arguments)


def test_logprob_passes_opcheck():
    logits, target = torch.randn(5, 40, requires_grad=True), torch.arange(5)
    for ids in (target, torch.stack([target, target], 1)):
        torch.library.opcheck(logits_op.overload, (logits, ids, torch.ones(5), 20.0, -100, True, False, "chunked"))


def test_both_primitives_compile_without_a_graph_break():
    hidden, weight, target = peaked_inputs(6, 8, 50)

    def loss(x, w, y):
        a = linear_logprob(x, w, y, entropy=True)
        b = logprob(x @ w.T, y, temperature=0.7)
        c = linear_logprob(x, w, torch.stack([y, y // 2], 1), statistics=True)
        return (a.logp + a.entropy + b.logp).sum() + (c.logp.sum(1) * c.is_top1.any(1)).sum()

    grads = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        x, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        value = run(x, w, target)
        grads.append((value.detach(), *torch.autograd.grad(value, (x, w))))
    for eager, compiled in zip(*grads):
        torch.testing.assert_close(eager, compiled)
