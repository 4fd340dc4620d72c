"""FlowRL as torchtitan's chunked loss, built and called as its PolicyTrainer does it (which wants vLLM: not run)."""

import re
import sys
from importlib.metadata import files
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytest.importorskip("torchtitan", reason="torchtitan is not installed here: `make test-integrations` has it")
sys.path.insert(0, str(Path(__file__).parent.parent))
from ranks import on_ranks
from torch.distributed.fsdp import fully_shard
from torchtitan.components.loss import ChunkedLossWrapper

from flowrl_kernels import flowrl_loss, linear_logprob
from flowrl_kernels.integrations.torchtitan import FlowRLLoss
from flowrl_kernels.testing import assert_grad_close, peaked_inputs

B, L, H, V = 4, 24, 16, 61
RUNS = [(0, 3, 9), (0, 12, 22), (1, 1, 24), (2, 5, 6), (2, 8, 15)]  # row, first and last token; the last row has none
ADVANTAGES = [0.8, -0.5, 1.2, -1.0, 0.3]


def batch():
    hidden, weight, labels = peaked_inputs(B * L, H, V, peak=8.0)
    hidden, labels = hidden.view(B, L, H), labels.view(B, L)
    mask, advantages = torch.zeros(B, L, dtype=torch.bool), torch.zeros(B, L)
    for (row, first, last), advantage in zip(RUNS, ADVANTAGES):
        mask[row, first:last] = True
        advantages[row, first:last] = advantage
    noise = torch.randn(B, L, generator=torch.Generator().manual_seed(2))
    old = linear_logprob(hidden, weight, labels).logp + 0.1 * noise
    old[0, 4] = torch.nan  # a token that the generator gave no log-prob for
    return hidden, weight, {"labels": labels, "generator_logprobs": old, "advantages": advantages, "loss_mask": mask}


def head_of(weight):
    head = nn.Linear(H, V, bias=False)
    head.weight.data.copy_(weight)
    return head


def built(head, **config):
    loss = FlowRLLoss.Config(settings={"beta": 3.0}, **config).build()
    assert isinstance(loss, ChunkedLossWrapper)  # what makes PolicyTrainer call set_lm_head and skip the head
    loss.set_lm_head(head)
    return loss


def wanted():
    """The specification, a response at a time: a mean over responses, and both gradients."""
    hidden, weight, data = batch()
    x, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = linear_logprob(x, w, data["labels"], impl="reference").logp
    rows, olds, masks = [], [], []
    for row, first, last in RUNS:
        old = data["generator_logprobs"][row, first:last].double()
        rows, olds, masks = [*rows, logp[row, first:last]], [*olds, old], [*masks, old.isfinite()]
    padded = [nn.utils.rnn.pad_sequence(values, batch_first=True) for values in (rows, olds, masks)]
    out = flowrl_loss(
        padded[0], None, torch.tensor(ADVANTAGES, dtype=torch.float64), None, logp_old=padded[1], mask=padded[2],
        preset="release_old_anchor_no_log_z", beta=3.0, impl="reference",
    )  # fmt: skip
    return out, *torch.autograd.grad(out.loss, (x, w))


TOKENS = sum(last - first for _, first, last in RUNS) - 1


@pytest.mark.parametrize("flat", [False, True])
def test_rows_and_flat_tokens_have_the_loss_and_gradients_of_the_specification(flat):
    hidden, weight, data = batch()
    if flat:
        hidden, data = hidden.view(-1, H), {name: value.reshape(-1) for name, value in data.items()}
    x, head = hidden.clone().requires_grad_(), head_of(weight)
    loss, metrics = built(head, response_tokens=TOKENS / len(RUNS))(x, data.pop("labels"), TOKENS, **data)
    loss.backward()
    expected, dx, dw = wanted()
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    assert_grad_close(x.grad.view(B, L, H), dx, rel=1e-5)
    assert_grad_close(head.weight.grad, dw, rel=1e-5)
    assert all(value.dim() == 0 for value in metrics.values())
    torch.testing.assert_close(
        metrics["loss/flowrl_residual_mean_abs/mean"].double(), expected.residual.abs().mean(), rtol=1e-5, atol=1e-6
    )
    assert "forward" not in vars(head)


def sharded_worker(rank, world):
    """PolicyTrainer's FSDP: the head is a unit of its own, each rank has its rows, gradients are summed."""
    hidden, weight, data = batch()
    rows = slice(rank * B // world, (rank + 1) * B // world)
    head = head_of(weight)
    fully_shard(head)
    head.set_gradient_divide_factor(1.0)
    head.set_force_sum_reduction_for_comms(True)  # gloo knows no other sum
    x = hidden[rows].clone().requires_grad_()
    mine = {name: value[rows] for name, value in data.items()}
    loss, metrics = built(head, response_tokens=TOKENS / len(RUNS))(x, mine.pop("labels"), TOKENS, **mine)
    loss.backward()
    whole = {name: value.clone() for name, value in metrics.items()}
    for name, value in whole.items():
        dist.all_reduce(value, dist.ReduceOp.MAX if name.endswith("/max") else dist.ReduceOp.SUM)
    expected, dx, dw = wanted()
    torch.testing.assert_close(whole["loss/mean"].double(), expected.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(whole["loss/flowrl_weight/max"].double(), expected.weight.max(), rtol=1e-5, atol=1e-6)
    assert_grad_close(head.weight.grad.full_tensor(), dw, rel=1e-5)
    if float(dx[rows].norm()) > 0:
        assert_grad_close(x.grad, dx[rows], rel=1e-5)


@pytest.mark.distributed
def test_under_fsdp_the_head_s_hooks_gather_and_reduce():
    on_ranks(sharded_worker, 2)


def test_a_batch_without_responses_has_loss_and_gradients_zero():
    hidden, weight, data = batch()
    x, head = hidden[3:].clone().requires_grad_(), head_of(weight)
    data = {name: value[3:] for name, value in data.items()}
    loss, _ = built(head)(x, data.pop("labels"), TOKENS, **data)
    loss.backward()
    assert loss == 0
    assert (x.grad == 0).all()
    assert (head.weight.grad == 0).all()


def test_the_policy_trainer_calls_what_we_offer():
    """Read, not run: its source asks for a ChunkedLossWrapper and names the arguments that are taken here."""
    path = next(f for f in files("torchtitan") if str(f).endswith("experiments/rl/actors/trainer.py"))
    source = path.read_text()
    assert "isinstance(self.loss_fn, ChunkedLossWrapper)" in source
    assert "self.loss_fn.set_lm_head(lm_head)" in source
    call = re.search(r"self\.loss_fn\(\s*pred,\s*labels,\s*num_global_valid_tokens,(.*?)\)\n", source, re.S).group(1)
    assert re.findall(r"(\w+)=", call) == ["generator_logprobs", "advantages", "loss_mask"]


def test_what_cannot_work_says_so(monkeypatch):
    hidden, weight, data = batch()
    labels = data.pop("labels")
    with pytest.raises(RuntimeError, match="lm_head: wanted set_lm_head"):
        FlowRLLoss.Config().build()(hidden, labels, TOKENS, **data)
    with pytest.raises(ValueError, match="logp_ref: wanted log-probs of the reference"):
        built(head_of(weight), preset="paper")(hidden, labels, TOKENS, **data)
    monkeypatch.setattr("flowrl_kernels.integrations.torchtitan.spmd_mesh_size", lambda axis: 2)
    with pytest.raises(ValueError, match="tp: wanted 1"):
        built(head_of(weight))(hidden, labels, TOKENS, **data)
