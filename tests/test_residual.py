"""The residual family against loops written from the formulas, in every row, layout and implementation."""

import math

import pytest
import residual_oracle
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_oracle import SPECS

from flowrl_kernels import LinearFlowRLLoss, flowrl_loss, residual_loss
from flowrl_kernels.ops.residual import residual as residual_op
from flowrl_kernels.presets import PRESETS
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of, ragged_mask

IMPLS = ["reference", "chunked"]
TOKENS = ("logp", "ref", "old", "sampler")


def make(b=9, t=11, seed=0, dtype=torch.float64, spread=0.15):
    """A ragged batch with holes, an empty row, groups of several and of one, and ratios on both sides of every clip."""
    draw = torch.Generator().manual_seed(seed)
    mask = ragged_mask(b, t, seed=seed)
    logp = -torch.rand(b, t, generator=draw, dtype=torch.float64) * 3
    data = {"logp": logp, "mask": mask}
    for name in TOKENS[1:]:
        data[name] = logp + spread * torch.randn(b, t, generator=draw, dtype=torch.float64)
    data["old"][:2] += torch.tensor([0.45, -0.7])[:b, None]  # far below and far above
    data["reward"] = torch.randn(b, generator=draw, dtype=torch.float64)
    data["reward"][:2] = torch.tensor([-0.7, 0.6])[:b]  # where PPO's surrogate picks its clipped branch
    data["old"][7:8] += 0.45  # far below, where it picks the other one
    data["reward"][7:8] = 1.0
    data["log_z"] = torch.randn(b, generator=draw, dtype=torch.float64)
    data["groups"] = torch.tensor(([3, 7, 3, 7, 7, 5, 3, 7, 3] * b)[:b])
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}


def pack(data):
    """The same batch as [N] with cu_seqlens and a mask for the holes."""
    lengths = torch.where(data["mask"].any(1), data["mask"].shape[1] - data["mask"].flip(1).int().argmax(1), 0)
    inside = torch.arange(data["mask"].shape[1]) < lengths[:, None]
    packed = {k: v[inside] if v.shape == inside.shape else v for k, v in data.items()}
    return packed, cu_seqlens_of(lengths), inside


def call(name, data, *, log_z=None, cu_seqlens=None, **arguments):
    spec = SPECS[name]
    partition = {"learned": data["log_z"] if log_z is None else log_z, "group": "group", "through": "through"}
    return flowrl_loss(
        data["logp"], data["ref"] if spec.anchor == "ref" else None, data["reward"], partition.get(spec.z),
        logp_old=data["old"], logp_sampler=data["sampler"] if spec.second else None, mask=data["mask"],
        cu_seqlens=cu_seqlens, groups=data["groups"], preset=name, **arguments,
    )  # fmt: skip


def run(name, data, **arguments):
    """The output and both gradients."""
    leaves = {k: data[k].clone().requires_grad_() for k in ("logp", "log_z")}
    out = call(name, {**data, **leaves}, **arguments)
    dlogp, dlog_z = torch.autograd.grad(out.loss, tuple(leaves.values()), allow_unused=True)
    return out, dlogp, torch.zeros_like(data["log_z"]) if dlog_z is None else dlog_z


def expected(name, data, normalizer=None):
    leaves = {k: data[k].clone().requires_grad_() for k in ("logp", "log_z")}
    loss, residuals, weights = residual_oracle.loss(SPECS[name], {**data, **leaves}, normalizer)
    zeros = [torch.zeros_like(t) for t in leaves.values()]
    if not loss.requires_grad:
        return loss, residuals, weights, *zeros
    grads = torch.autograd.grad(loss, tuple(leaves.values()), allow_unused=True)
    return loss.detach(), residuals, weights, *(z if g is None else g for z, g in zip(zeros, grads))


def close(actual, wanted, tolerance=1e-9):
    actual, wanted = (torch.as_tensor(x, dtype=torch.float64) for x in (actual, wanted))
    size = max(1.0, float(wanted.abs().max())) if wanted.numel() else 1.0
    assert actual.shape == wanted.shape
    assert float((actual - wanted).abs().max() if wanted.numel() else 0.0) <= tolerance * size


def by_sequence(values, num):
    out = torch.zeros(num, dtype=torch.float64)
    for b, value in values.items():
        out[b] = value
    return out


def test_every_preset_has_a_formula_and_every_formula_a_preset():
    assert set(SPECS) == set(PRESETS)
    assert all(row.source for row in PRESETS.values())


def test_the_batch_reaches_every_branch():
    data = make()
    weights = residual_oracle.loss(SPECS["unclipped"], data)[2].values()
    assert min(weights) < 0.8
    assert max(weights) > 10.0
    assert any(0.8 < w < 1.2 for w in weights)
    base = {name: float(residual_oracle.loss(SPECS[name], data)[0]) for name in SPECS}
    assert base["release_clip_logp"] != base["release_gspo_select"] != base["release"]
    assert base["hard_cispo_drop"] != base["hard"]
    assert not data["mask"].any(1).all()
    assert (data["mask"].int().diff(dim=1) > 0).any(), "no holes"


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SPECS)
def test_value_and_both_gradients_equal_the_formulas(name, impl):
    for seed in range(3):
        data = make(seed=seed)
        loss, residuals, weights, dlogp, dlog_z = expected(name, data)
        out, got_dlogp, got_dlog_z = run(name, data, impl=impl)
        close(out.loss.detach(), loss)
        close(out.residual, by_sequence(residuals, 9))
        close(out.weight, by_sequence(weights, 9))
        close(got_dlogp, dlogp)
        close(got_dlog_z, dlog_z)
        assert_grad_close(got_dlogp, dlogp, rel=1e-9)
        if SPECS[name].z == "learned":
            assert_grad_close(got_dlog_z, dlog_z, rel=1e-9)
        assert (got_dlogp[~data["mask"]] == 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_the_gradient_of_the_paper_is_the_closed_form(impl):
    data = make(seed=4)
    out, dlogp, dlog_z = run("paper", data, impl=impl)
    for b in range(9):
        n = int(data["mask"][b].sum())
        coefficient = 2 * out.weight[b] * out.residual[b] / 9
        close(dlog_z[b], coefficient if n else 0.0)
        for t in range(11):
            close(dlogp[b, t], coefficient / n if data["mask"][b, t] else 0.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SPECS)
def test_packed_equals_padded(name, impl):
    data = make(seed=1)
    packed, cu_seqlens, inside = pack(data)
    a, da, za = run(name, data, impl=impl)
    b, db, zb = run(name, packed, cu_seqlens=cu_seqlens, impl=impl)
    close(b.loss.detach(), a.loss.detach())
    close(b.residual, a.residual)
    close(b.weight, a.weight)
    close(db, da[inside])
    close(zb, za)
    for key in a.metrics:
        close(b.metrics[key], a.metrics[key])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=7),
    name=st.sampled_from(sorted(SPECS)),
    seed=st.integers(0, 10**6),
)
def test_any_layout_gives_what_the_formulas_say(lengths, name, seed):
    data = make(len(lengths), max(1, *lengths), seed=seed)
    data["mask"] = torch.arange(data["mask"].shape[1]) < torch.tensor(lengths)[:, None]
    loss, _, _, dlogp, dlog_z = expected(name, data)
    packed, cu_seqlens, inside = pack(data)
    for out, da, dz in (run(name, data), run(name, packed, cu_seqlens=cu_seqlens)):
        close(out.loss.detach(), loss)
        close(da, dlogp if da.dim() == 2 else dlogp[inside])
        close(dz, dlog_z)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SPECS)
def test_what_does_not_count_changes_nothing_even_if_it_is_nan(name, impl):
    data = make(seed=2)
    clean, dlogp, dlog_z = run(name, data, impl=impl)
    empty = ~data["mask"].any(1)
    assert int(empty.sum()) == 1
    dirty = {k: v.clone() for k, v in data.items()}
    for key, junk in zip(TOKENS, (math.nan, math.inf, -math.inf, math.nan)):
        dirty[key][~data["mask"]] = junk
    dirty["reward"][empty] = math.nan
    dirty["log_z"][empty] = math.nan
    out, got_dlogp, got_dlog_z = run(name, dirty, impl=impl)
    assert torch.equal(out.loss, clean.loss)
    assert torch.equal(got_dlogp, dlogp)
    assert torch.equal(got_dlog_z, dlog_z)
    assert (dlog_z[empty] == 0).all()
    assert out.residual[empty] == 0
    assert out.weight[empty] == 0
    assert all(torch.equal(out.metrics[k], clean.metrics[k]) for k in clean.metrics)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SPECS)
def test_nothing_to_learn_from_gives_zero_and_no_nan(name, impl):
    data = make(4, 5)
    data["mask"][:] = False
    for batch in (data, {k: v[:0] for k, v in data.items()}):
        out, dlogp, dlog_z = run(name, batch, impl=impl)
        assert out.loss == 0
        assert (dlogp == 0).all()
        assert (dlog_z == 0).all()
        assert all(v.isfinite() for v in out.metrics.values())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("total", [500.0, -500.0])
def test_a_log_ratio_of_500_leaves_everything_finite(name, impl, total):
    for tokens in (1, 40):
        data = make(4, 40, dtype=torch.float32)
        data["mask"][:] = True
        data["mask"][:, tokens:] = False
        for other in ("old", "ref", "sampler"):
            data[other] = data["logp"] - total / tokens
        out, dlogp, dlog_z = run(name, data, impl=impl)
        for value in (out.loss, out.weight, out.residual, dlogp, dlog_z, *out.metrics.values()):
            assert value.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weight_is_exactly_one_where_old_is_the_current_policy(impl, dtype):
    data = make(dtype=dtype)
    data["old"] = data["logp"].clone()
    data["sampler"] = data["logp"].clone()
    used = data["mask"].any(1)
    for name in SPECS:
        out = call(name, data, impl=impl)
        length = data["mask"].sum(1)[used].double()
        wanted = (1.0 / length if SPECS[name].power else torch.ones_like(length)).to(out.weight.dtype)
        assert torch.equal(out.weight[used], wanted), name
        assert out.metrics["clipped_low"] == out.metrics["clipped_high"] == 0


def test_without_old_log_probs_the_weight_is_one():
    data = make()
    out = flowrl_loss(data["logp"], data["ref"], data["reward"], data["log_z"], mask=data["mask"])
    close(out.loss, expected("no_is", data)[0])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", [n for n in SPECS if SPECS[n].z != "through"])
def test_micro_batches_under_a_global_normalizer_add_up_to_the_batch(name, impl):
    data = make(seed=3)
    data["groups"] = torch.tensor([1, 1, 1, 2, 2, 2, 3, 3, 3])
    counts = (31.0, 173.0)  # sequences and tokens of the whole update
    whole, dlogp, dlog_z = run(name, data, normalizer=counts, impl=impl)
    close(whole.loss.detach(), expected(name, data, counts)[0])
    parts = []
    for part in (slice(0, 3), slice(3, 9)):
        own = {k: v[part] for k, v in data.items()}
        parts.append(run(name, own, normalizer=torch.tensor(counts), impl=impl))
    close(parts[0][0].loss.detach() + parts[1][0].loss.detach(), whole.loss.detach())
    close(torch.cat([p[1] for p in parts]), dlogp)
    close(torch.cat([p[2] for p in parts]), dlog_z)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_normalizer_divides_sequences_or_tokens_whichever_the_row_sums(impl):
    data = make()
    for name in ("paper", "token_log_z_beta30"):
        for normalizer in (17.0, torch.tensor(17.0), torch.tensor([17])):
            out, dlogp, _ = run(name, data, normalizer=normalizer, impl=impl)
            loss, *_, wanted, _ = expected(name, data, 17.0)
            close(out.loss.detach(), loss)
            assert_grad_close(dlogp, wanted, rel=1e-9)
    with pytest.raises(ValueError, match="normalizer: .*sequences, tokens.*tb_ppo_style"):
        run("tb_ppo_style", data, normalizer=17.0, impl=impl)


def test_scaling_and_reusing_the_loss():
    data = make(dtype=torch.float32)
    logp = data["logp"].clone().requires_grad_()
    out = call("paper", {**data, "logp": logp})
    (once,) = torch.autograd.grad(out.loss, logp, retain_graph=True)
    (twice,) = torch.autograd.grad(out.loss * 2, logp, retain_graph=True)
    (sum_of_two,) = torch.autograd.grad(out.loss + out.loss, logp)
    assert torch.equal(twice, 2 * once)
    assert torch.equal(sum_of_two, 2 * once)
    assert not any(t.requires_grad for t in (out.residual, out.weight, *out.metrics.values()))


@pytest.mark.parametrize("phi", ["square", "abs", "exp", "exp_half", "cosh"])
@pytest.mark.parametrize("center", [None, "detached", "through"])
def test_the_family_by_its_own_door(phi, center):
    data = make(seed=6)
    target = data["reward"] * 0.3
    spec = residual_oracle.Spec(
        beta=1.0, a=0.2, z={None: None, "detached": "group", "through": "through"}[center], weight="mean", lo=0.9,
        hi=1.1, phi=phi,
    )  # fmt: skip
    grads, values = [], []
    for impl in (None, *IMPLS):
        logp = data["logp"].clone().requires_grad_()
        if impl is None:
            loss = residual_oracle.loss(spec, {**data, "logp": logp, "reward": target})[0]
        else:
            loss = residual_loss(
                logp, target, anchor=data["ref"], logp_old=data["old"], scale=0.2, center=center,
                groups=data["groups"], mask=data["mask"], ratio="mean", clip=(0.9, 1.1), phi=phi, impl=impl,
            ).loss  # fmt: skip
        values.append(loss.detach())
        grads.append(torch.autograd.grad(loss, logp)[0])
    for value, grad in zip(values[1:], grads[1:]):
        close(value, values[0])
        assert_grad_close(grad, grads[0], rel=1e-9)


def test_a_learned_partition_goes_through_the_family_door_too():
    data = make()
    log_z = data["log_z"].clone().requires_grad_()
    out = residual_loss(
        data["logp"], data["reward"], anchor=data["ref"], log_z=log_z, scale=1.0, mask=data["mask"], preset="tb"
    )
    loss, *_, dlog_z = expected("tb", data)
    close(out.loss.detach(), loss)
    close(torch.autograd.grad(out.loss, log_z)[0], dlog_z)


def test_rebel_is_half_its_loss_over_pairs():
    data = make(4, 6)
    data["mask"][:] = True
    data["groups"] = torch.tensor([0, 0, 1, 1])
    eta = 1.7
    out = call("rebel", data, beta=eta, normalizer=1.0)
    s = (data["logp"] - data["old"]).sum(1)
    pairs = sum((s[i] - s[i + 1] - eta * (data["reward"][i] - data["reward"][i + 1])) ** 2 for i in (0, 2))
    close(2 * out.loss, pairs)


def test_length_normalize_false_is_trajectory_balance():
    data = make()
    out = flowrl_loss(
        data["logp"], data["ref"], data["reward"], data["log_z"], mask=data["mask"], beta=1.0, length_normalize=False,
        ratio=None,
    )  # fmt: skip
    close(out.loss, expected("tb", data)[0])


def test_a_tensor_may_stand_in_for_the_mean_of_a_group_that_spans_micro_batches():
    data = make()
    used = data["mask"].any(1)
    whole = call("group", data)
    own = residual_oracle.loss(SPECS["release_no_log_z"], data)[1]
    means = torch.zeros(9, dtype=torch.float64)
    for b in range(9):
        peers = [d for c, d in own.items() if data["groups"][c] == data["groups"][b]]
        means[b] = -sum(peers) / len(peers)
    out = flowrl_loss(
        data["logp"], data["ref"], data["reward"], means, logp_old=data["old"], mask=data["mask"], preset="group"
    )
    close(out.loss, whole.loss)
    close(out.residual[used], whole.residual[used])


@pytest.mark.parametrize("impl", IMPLS)
def test_metrics_by_hand(impl):
    logp = torch.tensor([[-1.0, -2.0, -9.0], [-1.0, -1.0, -1.0], [-5.0, -5.0, -5.0], [-2.0, -1.0, -3.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    old = logp + torch.tensor([[-0.5, 0.1, 3.0], [0.2, 0.2, 0.2], [1.0, 1.0, 1.0], [0.05, 0.0, 0.0]])
    ref = logp + torch.tensor([[0.2, 0.4, 5.0], [0.0, 0.3, 0.0], [1.0, 1.0, 1.0], [-0.6, 9.0, 9.0]])
    reward, log_z = torch.tensor([1.0, -1.0, 3.0, 0.5]), torch.tensor([1.0, 2.0, 77.0, 6.0])
    out = flowrl_loss(logp, ref, reward, log_z, logp_old=old, mask=mask, beta=2.0, impl=impl)
    delta = [1 - 0.3 - 2, 2 - 0.1 + 2, 6 + 0.6 - 1.0]
    weight = [1.2, 0.8, math.exp(-0.05)]
    close(out.loss, sum(w * d * d for w, d in zip(weight, delta)) / 4, 1e-6)
    wanted = {
        "residual_mean_abs": sum(map(abs, delta)) / 3,
        "residual_max_abs": 5.6,
        "weight_mean": sum(weight) / 3,
        "weight_min": 0.8,
        "weight_max": 1.2,
        "clipped_low": 1 / 3,
        "clipped_high": 1 / 3,
        "log_ratio_old_mean": (0.4 - 0.6 - 0.05) / 3,
        "log_ratio_ref_mean": (-0.3 - 0.1 + 0.6) / 3,
        "log_z_mean": 3.0,
        "log_z_std": math.sqrt((4 + 1 + 9) / 3),
        "nonfinite": 0.0,
    }
    assert set(out.metrics) == set(wanted)
    for key, value in wanted.items():
        assert float(out.metrics[key]) == pytest.approx(value, abs=1e-5), key
        assert out.metrics[key].shape == ()
        assert out.metrics[key].dtype == torch.float32


def test_token_weights_report_the_share_of_clipped_tokens():
    data = make()
    out = call("token_no_anchor_no_log_z", data)
    shares = {0.8: [], 1.28: []}
    for b in range(9):
        ratios = [(data["logp"][b, t] - data["old"][b, t]).exp() for t in range(11) if data["mask"][b, t]]
        if ratios:
            shares[0.8].append(float(sum(r < 0.8 for r in ratios)) / len(ratios))
            shares[1.28].append(float(sum(r > 1.28 for r in ratios)) / len(ratios))
    close(out.metrics["clipped_low"], sum(shares[0.8]) / len(shares[0.8]))
    close(out.metrics["clipped_high"], sum(shares[1.28]) / len(shares[1.28]))


@pytest.mark.parametrize("impl", IMPLS)
def test_a_nan_that_counts_is_reported_and_not_hidden(impl):
    data = make()
    row = int(data["mask"].any(1).nonzero()[0])
    token = int(data["mask"][row].nonzero()[0])
    data["logp"][row, token] = math.nan
    out = call("paper", data, impl=impl)
    assert out.loss.isnan()
    assert out.metrics["nonfinite"] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_in_and_out(dtype):
    data = make(dtype=dtype)
    wide = {k: v.double() if v.is_floating_point() else v for k, v in data.items()}
    loss, *_, dlogp, dlog_z = expected("paper", wide)
    out, got, got_z = run("paper", data)
    assert out.loss.dtype == out.residual.dtype == out.weight.dtype == torch.float32
    assert got.dtype == got_z.dtype == dtype
    close(out.loss.detach(), loss, 1e-6)  # sums run in float64 from the rounded inputs
    assert_grad_close(got, dlogp, rel={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype])
    assert_grad_close(got_z, dlog_z, rel={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype])


def test_a_long_response_loses_nothing_in_float32():
    n = 8192
    draw = torch.Generator().manual_seed(0)
    logp = -torch.rand(1, n, generator=draw)
    old = logp + 0.01 * torch.randn(1, n, generator=draw)
    out = flowrl_loss(logp, old, torch.zeros(1), None, logp_old=old, clip="unclipped")
    exact = math.exp(float((logp.double() - old.double()).sum()))
    assert float(out.weight) == pytest.approx(exact, rel=1e-6)


def operands(name, packed):
    data = make(dtype=torch.float32)
    cu_seqlens = None
    if packed:
        data, cu_seqlens, _ = pack(data)
        cu_seqlens = cu_seqlens.long()
    row = PRESETS[name]
    anchor = {"ref": data["ref"], "old": data["old"], None: None}[row.anchor]
    log_z = data["log_z"].requires_grad_() if row.log_z == "learned" else None
    return (
        data["logp"].requires_grad_(), log_z, anchor, data["old"], data["sampler"], data["reward"], data["mask"],
        cu_seqlens, data["groups"], torch.tensor(9.0), row.codes(), row.packed_numbers(), "chunked",
    )  # fmt: skip


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["paper", "agro", "token_log_z_beta30"])
def test_the_operator_keeps_its_contract(name, packed):
    torch.library.opcheck(residual_op.overload, operands(name, packed))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["paper", "release_tis_token", "tba"])
def test_the_loss_compiles_without_a_graph_break(name, packed):
    data, cu_seqlens = make(dtype=torch.float32), None
    if packed:
        data, cu_seqlens, _ = pack(data)

    def loss(logp, log_z):
        out = call(name, {**data, "logp": logp * 1.0}, log_z=log_z, cu_seqlens=cu_seqlens)
        return out.loss + 0.0 * out.metrics["weight_mean"]

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [data["logp"].clone().requires_grad_(), data["log_z"].clone().requires_grad_()]
        value = f(*leaves)
        grads = torch.autograd.grad(value, leaves, allow_unused=True)
        results.append([value.detach(), *(g for g in grads if g is not None)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled)


@pytest.mark.parametrize("single_pass", [True, False])
def test_the_loss_from_hidden_states_compiles_without_a_graph_break(single_pass):
    data = make(dtype=torch.float32)
    draw = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(9, 11, 8, generator=draw), torch.randn(50, 8, generator=draw)
    target = torch.randint(50, (9, 11), generator=draw)
    module = LinearFlowRLLoss(preset="release", single_pass=single_pass)

    def loss(x, w, z):
        return module(
            x, w, target, data["ref"], data["reward"], z, logp_old=data["old"], mask=data["mask"], normalizer=9.0
        ).loss

    results = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, data["log_z"])]
        value = f(*leaves)
        results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    for eager, compiled in zip(*results):
        torch.testing.assert_close(eager, compiled, rtol=1e-4, atol=1e-5)
