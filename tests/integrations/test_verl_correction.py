"""`rollout_correction` against verl's own rollout_corr_helper: weights, rejections and figures."""

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed here: `make test-integrations` has it")
from verl.trainer.ppo import rollout_corr_helper as theirs

from flowrl_kernels import rollout_correction
from flowrl_kernels.core.correction import DEFAULTS

B, T = 12, 9
MASK = torch.arange(T) < torch.tensor([9, 1, 4, 7, 2, 9, 5, 3, 8, 6, 9, 2])[:, None]
WEIGHTS = {  # ours: (theirs, bounds in verl's own format)
    "token_truncate": ("token", "1.1"), "token_mask": ("token", "0.9_1.2"), "sequence_truncate": ("sequence", "1.3"),
    "sequence_mask": ("sequence", "0.8_1.4"),
}  # fmt: skip
REJECTIONS = {
    "token_k1": "0.9_1.2", "token_k2": "0.02", "token_k3": "0.02", "seq_sum_k1": "0.7_1.2", "seq_sum_k2": "0.1",
    "seq_sum_k3": "0.1", "seq_mean_k1": "0.95_1.04", "seq_mean_k2": "0.02", "seq_mean_k3": "0.02",
    "seq_max_k2": "0.05", "seq_max_k3": "0.05",
}  # fmt: skip


def logps():
    make = torch.Generator().manual_seed(4)
    sampler = -2 * torch.rand(B, T, generator=make)
    return sampler + 0.2 * torch.randn(B, T, generator=make), sampler


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_are_verls(name):
    old, sampler = logps()
    how, bounds = WEIGHTS[name]
    wanted, _ = theirs.compute_rollout_correction_weights(old - sampler, MASK.float(), how, bounds)
    out = rollout_correction(old, sampler, name, bounds, mask=MASK)
    assert 0.0 < float(out.metrics["mismatch_cut"]) < 1.0
    torch.testing.assert_close(out.weight, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", REJECTIONS)
def test_rejections_are_verls(name):
    old, sampler = logps()
    wanted, figures = theirs.compute_rollout_rejection_mask(old - sampler, MASK.float(), name, REJECTIONS[name])
    out = rollout_correction(old, sampler, name, REJECTIONS[name], mask=MASK)
    assert torch.equal(out.keep, wanted.bool())
    assert float(out.metrics["mismatch_cut"]) == pytest.approx(figures["rollout_rs_masked_fraction"], abs=1e-6)
    assert 0.0 < float(out.metrics["mismatch_cut"]) < 1.0


def test_every_name_of_verls_is_here_and_the_divergences_are_verls():
    assert set(REJECTIONS) == theirs.SUPPORTED_ROLLOUT_RS_OPTIONS
    assert {n for n in DEFAULTS if n[-2] == "k"} == set(REJECTIONS)
    old, sampler = logps()
    figures = theirs.compute_offpolicy_metrics(old, sampler, MASK.float())
    out = rollout_correction(old, sampler, mask=MASK).metrics
    assert float(out["mismatch_kl"]) == pytest.approx(figures["kl"], rel=1e-5)
    assert float(out["mismatch_k3"]) == pytest.approx(figures["k3_kl"], rel=1e-5)
    kept = old.expand(B, T)
    weights = (kept - sampler).exp()[MASK]  # 1 / E[(w / E[w])^2], as verl has it
    assert float(out["mismatch_ess"]) == pytest.approx(float(weights.mean() ** 2 / weights.square().mean()), rel=1e-5)
