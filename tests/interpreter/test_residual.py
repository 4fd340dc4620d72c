"""The Triton residual under the interpreter, against the plain torch of `chunked` on the same numbers in float64."""

import dataclasses

import pytest
import torch
from residual_runs import NAMES, agree, pack, run

from flowrl_kernels import flowrl_loss
from flowrl_kernels.chunked import residual as plain
from flowrl_kernels.core.types import METRICS
from flowrl_kernels.presets import PRESETS, Row
from flowrl_kernels.testing import assert_grad_close, poisoned_memory, ragged_mask
from flowrl_kernels.triton import residual as op

B, T = 5, 7


def batch(b=B, t=T, seed=0):
    """Ratios on both sides of every clip, an empty sequence, holes, groups of several and of one."""
    draw = torch.Generator().manual_seed(seed)
    mask = ragged_mask(b, t, seed=seed)
    logp = -3.0 * torch.rand(b, t, generator=draw)
    ref, old, sampler = (logp + 0.15 * torch.randn(b, t, generator=draw) for _ in range(3))
    old[0] += 0.4
    old[1:2] -= 0.5
    reward, log_z = torch.randn(b, generator=draw), torch.randn(b, generator=draw)
    reward[:2] = torch.tensor([-0.7, 0.6])[:b]
    return {
        "logp": logp, "ref": ref, "old": old, "sampler": sampler, "reward": reward, "log_z": log_z, "mask": mask,
        "groups": torch.tensor([5, 2, 5, 5, 9] * b)[:b],
    }  # fmt: skip


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks of tokens in a sequence and of sequences in the batch, at sizes the interpreter can bear."""
    monkeypatch.setattr(op, "BLOCK", 4)
    monkeypatch.setattr(op, "LANES", 4)


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_equals_the_formulas_in_float64(preset, small_blocks):
    row, data = PRESETS[preset], batch()
    with poisoned_memory():
        got = run(op, row, data)
    agree(got, run(plain, row, data))


@pytest.mark.parametrize("preset", ["paper", "group", "contrastive_tb", "token_old_anchor_no_log_z", "tb_ppo_style"])
@pytest.mark.parametrize("normalizer", [None, (23.0, 200.0)])
def test_packed_tokens_give_the_bits_of_padded_ones(preset, normalizer, small_blocks):
    data = batch()
    packed, cu_seqlens, inside = pack(data)
    one = run(op, PRESETS[preset], data, normalizer=normalizer)
    two = run(op, PRESETS[preset], packed, cu_seqlens, normalizer)
    one["dlogp"] = one["dlogp"][inside]
    assert all(torch.equal(one[name], two[name]) for name in NAMES)
    agree(two, run(plain, PRESETS[preset], packed, cu_seqlens, normalizer))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shift", [-500.0, 500.0])
def test_a_ratio_of_e_to_the_500_stays_finite(preset, shift):
    data = batch(2, 5)
    data["old"] = data["logp"] - shift / data["mask"].sum(1, keepdim=True).clamp_min(1)
    got = run(op, PRESETS[preset], data)
    assert all(value.isfinite().all() for value in got.values())


def test_shipped_block_sizes_take_long_and_short_sequences():
    data = batch(3, 2500)
    data["old"] = data["logp"] + 0.01 * (data["old"] - data["logp"])
    agree(run(op, PRESETS["release"], data), run(plain, PRESETS["release"], data))


def test_the_weight_is_exactly_one_where_old_is_current():
    data = batch()
    data["old"] = data["logp"].clone()
    assert torch.equal(run(op, PRESETS["paper"], data)["weight"], data["mask"].any(1).float())


def test_what_stands_in_the_padding_reaches_nothing():
    data = batch()
    dirty = {k: v.clone() for k, v in data.items()}
    for name in ("logp", "ref", "old", "sampler"):
        dirty[name][~data["mask"]] = float("nan")
    empty = ~data["mask"].any(1)
    dirty["reward"][empty], dirty["log_z"][empty] = float("nan"), float("inf")
    for preset in ("paper", "tb_ppo_style", "token_log_z_beta30", "hard_cispo_drop", "clip_geo_tis_geo"):
        clean, got = run(op, PRESETS[preset], data), run(op, PRESETS[preset], dirty)
        assert all(torch.equal(clean[name], got[name]) for name in NAMES), preset


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["logp", "old"])
def test_numbers_that_are_not_finite_show_and_are_counted(bad, where):
    data = batch()
    data["mask"][3, 0] = True
    data[where][3, 0] = bad
    got, want = (run(launcher, PRESETS["paper"], data) for launcher in (op, plain))
    assert not got["loss"].isfinite()
    assert got["metrics"][METRICS.index("nonfinite")] == 1
    others = torch.arange(B) != 3
    assert got["dlogp"][others].isfinite().all()
    for name in ("residual", "weight", "metrics"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=2e-6, atol=2e-6, equal_nan=True)


def test_nothing_to_learn_from_gives_zeros():
    data = batch()
    data["mask"].zero_()
    for preset in ("paper", "group", "token_log_z_beta30", "tb_ppo_style"):
        got = run(op, PRESETS[preset], data)
        assert not any(value.any() for value in got.values()), preset
    none = {k: v[:0] for k, v in batch().items()}
    got = run(op, PRESETS["paper"], none)
    assert got["loss"] == 0
    assert not got["metrics"].any()


@pytest.mark.parametrize(
    "fields",
    [
        *({"phi": phi, "scale": 1.0} for phi in ("square", "abs", "exp", "exp_half", "cosh")),
        *({"phi": alpha, "scale": 1.0} for alpha in (0.0, 1.0, 1.0 + 1e-9, 1.1, 3.0)),
        {"phi": "cosh", "log_z": "through"},
        {"phi": "exp", "level": "token"},
        {"phi": 0.5, "level": "token"},
        {"phi": -0.5, "log_z": "through"},
        {"phi": "abs", "log_z": "group", "ratio": "mean"},
    ],
    ids=str,
)
def test_fields_combine(fields, small_blocks):
    row, data = dataclasses.replace(Row("", beta=0.5), **fields), batch()
    agree(run(op, row, data), run(plain, row, data))


def test_log_probs_are_read_in_their_own_dtype_and_their_gradient_waits_unrounded(dtype):
    data = {k: v.to(dtype) if v.shape == (B, T) and v.is_floating_point() else v for k, v in batch().items()}
    got, want = run(op, PRESETS["release"], data), run(plain, PRESETS["release"], data)
    assert got["dlogp"].dtype == torch.float32  # a loss scale comes later
    assert got["residual"].dtype == torch.float32
    torch.testing.assert_close(got["residual"].double(), want["residual"], rtol=2e-6, atol=2e-6)
    assert_grad_close(got["dlogp"], want["dlogp"], rel=1e-5)


def test_the_public_loss_runs_on_the_kernel_and_its_operator_keeps_the_contract():
    data = batch()
    grads = []
    for impl in ("triton", "chunked"):
        logp, log_z = data["logp"].clone().requires_grad_(), data["log_z"].clone().requires_grad_()
        out = flowrl_loss(logp, data["ref"], data["reward"], log_z, logp_old=data["old"], mask=data["mask"], impl=impl)
        grads.append(torch.autograd.grad(out.loss * 1.5, (logp, log_z)))
    for got, want in zip(*grads):
        assert_grad_close(got, want, rel=2e-6)
    arguments = (
        data["logp"].requires_grad_(), data["log_z"].requires_grad_(), data["ref"], data["old"], None, data["reward"],
        data["mask"], None, None, None, PRESETS["paper"].codes(), PRESETS["paper"].packed_numbers(), "triton",
    )  # fmt: skip
    tests = ("test_schema", "test_faketensor", "test_autograd_registration")
    torch.library.opcheck(torch.ops.flowrl.residual.default, arguments, test_utils=tests)
