"""FlowRL as prime-rl's custom loss. prime-rl is on no package index: `Inputs` stands in for its LossInputs.

The names and shapes are those of prime-rl at commit 559b447; `packed_loss` sums and divides as its compute_loss does.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from flowrl_kernels.integrations.prime_rl import flowrl
from flowrl_kernels.losses import flowrl_loss
from flowrl_kernels.testing import assert_grad_close

LENGTHS, PROMPT = [5, 1, 8, 3], 4


@dataclass
class Inputs:
    trainer_logprobs: Tensor
    inference_logprobs: Tensor
    ref_logprobs: Tensor | None
    advantages: Tensor
    loss_mask: Tensor
    loss_weights: Tensor | None = None


def sequences(reference=False):
    make = torch.Generator().manual_seed(0)
    for i, length in enumerate(LENGTHS):
        num = PROMPT + length
        logp = -2.0 * torch.rand(num, generator=make)
        old, ref = (logp + 0.1 * torch.randn(num, generator=make) for _ in range(2))
        mask = torch.arange(num) >= PROMPT
        advantage = torch.where(mask, [0.7, -0.3, 1.1, -1.5][i], 0.0)
        yield Inputs(logp.requires_grad_(), old, ref if reference else None, advantage, mask)


def packed_loss(batch, **settings):
    outputs = [flowrl(inputs, **settings) for inputs in batch]
    return sum(out.loss for out in outputs) / sum(LENGTHS), [out.metrics for out in outputs]


def padded(batch, name):
    rows = [getattr(inputs, name).detach()[PROMPT:] for inputs in batch]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize("preset", ["release_old_anchor_no_log_z", "release_no_log_z"])
def test_a_batch_of_single_sequences_has_the_loss_and_gradients_of_a_mean_over_sequences(preset):
    batch = list(sequences(reference=preset == "release_no_log_z"))
    loss, metrics = packed_loss(batch, preset=preset, beta=3.0, response_tokens=sum(LENGTHS) / len(LENGTHS))
    loss.backward()
    logp = padded(batch, "trainer_logprobs").double().requires_grad_()
    ref = padded(batch, "ref_logprobs").double() if batch[0].ref_logprobs is not None else None
    wanted = flowrl_loss(
        logp, ref, torch.tensor([0.7, -0.3, 1.1, -1.5], dtype=torch.float64), None,
        logp_old=padded(batch, "inference_logprobs").double(), mask=padded(batch, "loss_mask"), preset=preset, beta=3.0,
        impl="reference",
    )  # fmt: skip
    torch.testing.assert_close(loss.double(), wanted.loss, rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(wanted.loss, logp)[0]
    for inputs, row in zip(batch, expected):
        assert (inputs.trainer_logprobs.grad[:PROMPT] == 0).all()
        assert_grad_close(inputs.trainer_logprobs.grad[PROMPT:], row[: len(inputs.loss_mask) - PROMPT], rel=1e-5)
    assert all(value.dim() == 0 for row in metrics for value in row.values())  # prime-rl stacks these
    assert {"flowrl/weight_mean", "flowrl/residual_mean_abs"} <= metrics[0].keys()


def test_weights_multiply_the_sequence_s_loss():
    inputs = next(sequences())
    twice = replace(inputs, loss_weights=torch.where(inputs.loss_mask, 2.0, 0.0))
    torch.testing.assert_close(flowrl(twice).loss, 2.0 * flowrl(inputs).loss)


def test_a_row_that_needs_what_prime_rl_does_not_hand_over_is_refused():
    inputs = next(sequences())
    with pytest.raises(ValueError, match="logp_ref: wanted log-probs of the reference"):
        flowrl(inputs, preset="release_no_log_z")
    with pytest.raises(ValueError, match="log_z: wanted 'group'"):
        flowrl(inputs, preset="group")
