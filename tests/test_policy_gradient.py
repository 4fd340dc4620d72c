"""Clipped policy gradients and the value loss against loops over tokens, in value and gradient."""

import math

import pytest
import torch

from flowrl_kernels import policy_gradient_loss, value_loss
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of, ragged_mask

B, T = 6, 9


def make(seed=0, dtype=torch.float64, spread=0.3):
    draw = torch.Generator().manual_seed(seed)
    mask = ragged_mask(B, T, seed=seed)
    logp = -3 * torch.rand(B, T, generator=draw, dtype=torch.float64)
    old, ref = (logp + spread * torch.randn(B, T, generator=draw, dtype=torch.float64) for _ in range(2))
    data = {
        "logp": logp, "old": old, "ref": ref, "mask": mask,
        "advantage": torch.randn(B, generator=draw, dtype=torch.float64),
        "per_token": torch.randn(B, T, generator=draw, dtype=torch.float64),
    }  # fmt: skip
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}


def packed(data):
    lengths = torch.where(data["mask"].any(1), T - data["mask"].flip(1).int().argmax(1), 0)
    inside = torch.arange(T) < lengths[:, None]
    flat = {k: v[inside] if v.shape == inside.shape else v for k, v in data.items()}
    return flat, cu_seqlens_of(lengths), inside


def aggregate(tokens, how, normalizer, horizon=T):
    """tokens: one list of scalars per sequence, empty ones included."""
    num = sum(map(len, tokens))
    zero = torch.zeros((), dtype=torch.float64)
    if how == "token-mean":
        return sum((sum(s, zero) for s in tokens), zero) / (normalizer or max(num, 1))
    divide = {
        "seq-mean-token-mean": len,
        "seq-mean-token-sum": lambda s: 1,
        "seq-mean-token-sum-norm": lambda s: horizon,
    }
    total = sum((sum(s, zero) / divide[how](s) for s in tokens if s), zero)
    return total / (normalizer or len(tokens))


def expected(
    data, *, ratio="token", clip=(0.8, 1.2), dual_clip=None, kl=None, kl_kind="k3", aggregate_by="token-mean",
    normalizer=None, per_token=False, horizon=T,
):  # fmt: skip
    lo, hi = (-math.inf if clip[0] is None else clip[0], math.inf if clip[1] is None else clip[1])
    losses, penalties = [], []
    for b in range(B):
        here = [t for t in range(T) if data["mask"][b, t]]
        losses.append([])
        penalties.append([])
        moves = [data["logp"][b, t] - data["old"][b, t].detach() for t in here]
        for t, move in zip(here, moves):
            a = float(data["per_token"][b, t] if per_token else data["advantage"][b])
            if ratio == "none":
                losses[b].append(-a * data["logp"][b, t])
                continue
            rho = move.exp()
            if ratio == "sequence":
                # exp(mean) in value; each token carries the gradient of its own log-prob (GSPO-token)
                rho = torch.exp(sum(moves).detach() / len(moves)) * torch.exp(move - move.detach())
            bounded = torch.clamp(rho, lo, hi)
            if ratio == "detached":
                losses[b].append(-a * bounded.detach() * data["logp"][b, t])
                continue
            one = -a * rho if float(-a * rho.detach()) > float(-a * bounded.detach()) else -a * bounded
            if dual_clip is not None and a < 0 and float(one.detach()) > -a * dual_clip:
                one = torch.tensor(-a * dual_clip, dtype=torch.float64)
            losses[b].append(one)
        for t in here:
            d = data["ref"][b, t].detach() - data["logp"][b, t]
            penalties[b].append(
                {"k1": lambda d: -d, "k2": lambda d: d * d / 2, "k3": lambda d: d.exp() - d - 1}[kl_kind](d)
            )
    total = aggregate(losses, aggregate_by, normalizer, horizon)
    if kl is not None:
        total = total + kl * aggregate(penalties, aggregate_by, normalizer, horizon)
    return total


def compare(data, *, per_token=False, aggregate_by="token-mean", **settings):
    """Value and gradient, padded and packed."""
    leaf = data["logp"].clone().requires_grad_()
    wanted = expected({**data, "logp": leaf}, per_token=per_token, aggregate_by=aggregate_by, **settings)
    (gradient,) = torch.autograd.grad(wanted, leaf)
    flat, cu_seqlens, inside = packed(data)
    for batch, layout in ((data, {"mask": data["mask"]}), (flat, {"mask": flat["mask"], "cu_seqlens": cu_seqlens})):
        logp = batch["logp"].clone().requires_grad_()
        extra = {"horizon": T} if "cu_seqlens" in layout and aggregate_by == "seq-mean-token-sum-norm" else {}
        out = policy_gradient_loss(
            logp, batch["old"], batch["per_token" if per_token else "advantage"],
            logp_ref=batch["ref"] if settings.get("kl") else None, aggregate=aggregate_by, **layout,
            **{**extra, **settings},
        )  # fmt: skip
        assert abs(float((out.loss - wanted).detach())) < 1e-12 * max(1, abs(float(wanted.detach())))
        (got,) = torch.autograd.grad(out.loss, logp)
        assert_grad_close(got, gradient if got.dim() == 2 else gradient[inside], rel=1e-12)
    return out


MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
METHODS = {
    "ppo": {},
    "ppo with dual clip": {"dual_clip": 1.05},
    "dapo": {"clip": (0.8, 1.28)},
    "one side": {"clip": (None, 1.1)},
    "no clip": {"clip": (None, None)},
    "grpo": {"kl": 0.3, "kl_kind": "k3"},
    "kl k1": {"kl": 0.3, "kl_kind": "k1"},
    "kl k2": {"kl": 0.3, "kl_kind": "k2"},
    "gspo": {"ratio": "sequence", "clip": (0.95, 1.05)},
    "cispo": {"ratio": "detached", "clip": (None, 1.28)},
    "raft": {"ratio": "none"},
}


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_value_and_gradient_equal_the_loop(method, how):
    compare(make(), aggregate_by=how, **METHODS[method])


@pytest.mark.parametrize("method", METHODS)
def test_token_advantages_and_a_normalizer(method):
    compare(make(seed=1), per_token=True, normalizer=37.0, **METHODS[method])
    compare(make(seed=2), per_token=True, normalizer=5.0, aggregate_by="seq-mean-token-mean", **METHODS[method])


def test_a_horizon_replaces_the_width():
    compare(make(), aggregate_by="seq-mean-token-sum-norm", horizon=50)


def test_the_batch_reaches_both_clips_and_the_dual_one():
    data = make()
    plain, clipped, dual = (
        float(expected(data, **METHODS[name])) for name in ("no clip", "ppo", "ppo with dual clip")
    )  # fmt: skip
    assert plain < clipped
    assert dual < clipped
    for mode in METHODS:
        assert float(expected(data, **METHODS[mode])) != 0.0


def test_the_gradient_of_gspo_is_the_papers():
    """arXiv 2507.18071: 1/|y| sum_t s(y) A grad log pi, with s the geometric mean of the ratios."""
    data = make(spread=0.05)
    logp = data["logp"].clone().requires_grad_()
    out = policy_gradient_loss(
        logp, data["old"], data["advantage"], mask=data["mask"], ratio="sequence", clip=(None, None),
        aggregate="seq-mean-token-mean",
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.loss, logp)
    wanted = torch.zeros_like(got)
    for b in range(B):
        here = [t for t in range(T) if data["mask"][b, t]]
        if here:
            s = math.exp(sum(float(data["logp"][b, t] - data["old"][b, t]) for t in here) / len(here))
            wanted[b, here] = -s * data["advantage"][b] / len(here) / B
            assert float(out.weight[b]) == pytest.approx(s, rel=1e-12)
    assert_grad_close(got, wanted, rel=1e-12)


def test_cispo_keeps_the_gradient_of_clipped_tokens():
    data = make()
    grads = []
    for ratio in ("token", "detached"):
        logp = data["logp"].clone().requires_grad_()
        out = policy_gradient_loss(
            logp, data["old"], data["advantage"], mask=data["mask"], ratio=ratio, clip=(None, 1.01)
        )  # fmt: skip
        grads.append(torch.autograd.grad(out.loss, logp)[0])
    assert (grads[0][data["mask"]] == 0).any()
    assert (grads[1][data["mask"]] != 0).all()


def test_metrics_by_hand():
    logp = torch.log(torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.2, 0.2]]))
    old = torch.log(torch.tensor([[0.25, 0.5, 0.9], [0.5, 0.4, 0.1]]))
    mask = torch.tensor([[True, True, False], [True, True, True]])
    ref = logp + 0.1
    out = policy_gradient_loss(logp, old, torch.tensor([1.0, -1.0]), mask=mask, kl=0.5, kl_kind="k1", logp_ref=ref)
    # losses: -1.2 (2 clipped), -1 | 1, 0.8 (0.5 clipped), 2
    assert float(out.loss) == pytest.approx((-1.2 - 1 + 1 + 0.8 + 2) / 5 - 0.05, rel=1e-6)
    wanted = {
        "clipped": 2 / 5,
        "weight_mean": ((2 + 1) / 2 + (1 + 0.5 + 2) / 3) / 2,
        "log_ratio_old_mean": (math.log(2) + 0.0) / 2,
        "kl": -0.1,
        "nonfinite": 0.0,
    }
    assert set(out.metrics) == set(wanted)
    for name, value in wanted.items():
        assert float(out.metrics[name]) == pytest.approx(value, rel=1e-5, abs=1e-7), name
    torch.testing.assert_close(out.residual, torch.tensor([-1.1, 3.8 / 3]))
    assert not any(t.requires_grad for t in (out.residual, out.weight, *out.metrics.values()))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_masked_out_changes_nothing_even_if_it_is_nan(method):
    data = make()
    dirty = {k: v.clone() for k, v in data.items()}
    for key, junk in (("logp", math.nan), ("old", -math.inf), ("ref", math.inf), ("per_token", math.nan)):
        dirty[key][~data["mask"]] = junk
    results = []
    for batch in (data, dirty):
        logp = batch["logp"].clone().requires_grad_()
        out = policy_gradient_loss(
            logp,
            batch["old"],
            batch["per_token"],
            mask=batch["mask"],
            logp_ref=batch["ref"] if METHODS[method].get("kl") else None,
            **METHODS[method],
        )
        results.append((out.loss.detach(), *torch.autograd.grad(out.loss, logp)))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("how", MODES)
@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_learn_from_gives_zero_and_no_nan(method, how):
    for rows in (B, 0):
        data = {k: v[:rows] for k, v in make().items()}
        logp = data["logp"].clone().requires_grad_()
        out = policy_gradient_loss(
            logp, data["old"], data["advantage"], mask=torch.zeros_like(data["mask"]),
            logp_ref=data["ref"] if METHODS[method].get("kl") else None, aggregate=how, **METHODS[method],
        )  # fmt: skip
        (got,) = torch.autograd.grad(out.loss, logp)
        assert out.loss == 0
        assert (got == 0).all()
        assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("move", [500.0, -500.0])
def test_a_log_ratio_of_500_leaves_everything_finite(method, move):
    data = make(dtype=torch.float32)
    logp = data["logp"].clone().requires_grad_()
    out = policy_gradient_loss(
        logp, data["logp"] - move, data["advantage"], mask=data["mask"],
        logp_ref=data["logp"] - move if METHODS[method].get("kl") else None, **METHODS[method],
    )  # fmt: skip
    (got,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.dtype == torch.float32
    for value in (out.loss, out.weight, out.residual, got, *out.metrics.values()):
        assert value.isfinite().all()


def test_micro_batches_under_a_global_normalizer_add_up():
    data = make()
    for how, normalizer in (("token-mean", 23.0), ("seq-mean-token-mean", torch.tensor(11.0))):
        grads = []
        for parts in ([slice(0, B)], [slice(0, 2), slice(2, B)]):
            logp = data["logp"].clone().requires_grad_()
            losses = [
                policy_gradient_loss(
                    logp[p], data["old"][p], data["advantage"][p], mask=data["mask"][p], aggregate=how,
                    normalizer=normalizer, kl=0.1, logp_ref=data["ref"][p],
                ).loss
                for p in parts
            ]  # fmt: skip
            grads.append(torch.autograd.grad(sum(losses), logp)[0])
        assert_grad_close(grads[1], grads[0], rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_in_and_out(dtype):
    data = make(dtype=dtype)
    logp = data["logp"].clone().requires_grad_()
    out = policy_gradient_loss(logp, data["old"], data["advantage"], mask=data["mask"])
    assert out.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.autograd.grad(out.loss, logp)[0].dtype == dtype
    values = torch.zeros(B, T, dtype=dtype)
    assert value_loss(values, values).dtype == out.loss.dtype


def test_the_ratio_is_exactly_one_where_old_is_the_current_policy():
    data = make(dtype=torch.float32)
    for ratio in ("token", "sequence", "detached"):
        out = policy_gradient_loss(data["logp"], data["logp"], data["advantage"], mask=data["mask"], ratio=ratio)
        assert (out.weight[data["mask"].any(1)] == 1.0).all()


def test_the_loss_compiles_without_a_graph_break():
    data = make(dtype=torch.float32)

    def loss(logp):
        return policy_gradient_loss(
            logp * 1.0, data["old"], data["advantage"], mask=data["mask"], kl=0.1, logp_ref=data["ref"], dual_clip=3.0
        ).loss

    grads = []
    for f in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        logp = data["logp"].clone().requires_grad_()
        grads.append(torch.autograd.grad(f(logp), logp)[0])
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("how", MODES[:3])
def test_the_value_loss_equals_the_loop(how, clip):
    draw = torch.Generator().manual_seed(0)
    value, returns, old = torch.randn(3, B, T, generator=draw, dtype=torch.float64)
    mask = ragged_mask(B, T)
    leaf = value.clone().requires_grad_()
    tokens = []
    for b in range(B):
        tokens.append([])
        for t in range(T):
            if mask[b, t]:
                v = leaf[b, t]
                error = (v - returns[b, t]) ** 2
                if clip is not None:
                    near = old[b, t] + torch.clamp(v - old[b, t], -clip, clip)
                    other = (near - returns[b, t]) ** 2
                    error = error if float(error.detach()) >= float(other.detach()) else other
                tokens[b].append(error / 2)
    wanted = aggregate(tokens, how, None)
    (gradient,) = torch.autograd.grad(wanted, leaf)
    dirty = value.masked_fill(~mask, math.nan).requires_grad_()
    old = None if clip is None else old
    got = value_loss(dirty, returns.masked_fill(~mask, math.nan), old_value=old, clip=clip, mask=mask, aggregate=how)
    assert abs(float((got - wanted).detach())) < 1e-12
    assert_grad_close(torch.autograd.grad(got, dirty)[0], gradient, rel=1e-12)
    flat, cu_seqlens, _ = packed({"mask": mask, "v": value, "r": returns, "o": value if old is None else old})
    again = value_loss(
        flat["v"],
        flat["r"],
        old_value=flat["o"] if clip else None,
        clip=clip,
        mask=flat["mask"],
        cu_seqlens=cu_seqlens,
        aggregate=how,
    )
    assert abs(float((again - wanted).detach())) < 1e-12
