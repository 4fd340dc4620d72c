"""What every loss owes its caller whatever the door, the layout and the implementation: junk where nothing counts, loss
scales, higher derivatives, divisors of 0, and batches without tokens.
"""

import math

import numpy as np
import pytest
import torch

from flowrl_kernels import (
    FlowRLLoss,
    LinearFlowRLLoss,
    LogPartition,
    advantages,
    flowrl_loss,
    linear_logprob,
    policy_gradient_loss,
    residual_loss,
    value_loss,
)
from flowrl_kernels.chunked import tiles
from flowrl_kernels.testing import assert_grad_close, peaked_inputs, ragged_mask

B, T, H, V = 4, 6, 8, 300
MASK = ragged_mask(B, T, seed=3)  # row 2 is empty
CU = torch.arange(0, B * T + 1, T)
TOKENS = ("hidden", "target", "logp", "ref", "old", "sampler", "temperature", "value", "returns", "advantage", "states")
JUNK = [math.nan, math.inf, -math.inf, 1e38]


def make(seed=0, dtype=torch.float32):
    hidden, weight, target = peaked_inputs(B * T, H, V, peak=6.0, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    data = {"hidden": hidden.view(B, T, H), "target": target.view(B, T), "weight": weight}
    data["logp"] = linear_logprob(hidden, weight, target).logp.view(B, T)
    for name in ("ref", "old", "sampler", "value", "returns", "advantage"):
        data[name] = data["logp"] + 0.1 * torch.randn(B, T, generator=draw)
    data["temperature"] = 0.5 + torch.rand(B, T, generator=draw)
    data["states"] = torch.randn(B, T, H, generator=draw)
    data["reward"], data["log_z"] = torch.randn(2, B, generator=draw)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in data.items()}


def spoiled(data, junk):
    """The same batch with junk at every position and sequence that does not count."""
    out, empty = {}, ~MASK.any(1)
    for name, value in data.items():
        out[name] = value.clone()
        if name == "target":
            out[name][~MASK] = V + 7
        elif name in TOKENS:
            out[name][~MASK] = junk
        elif name in ("reward", "log_z"):
            out[name][empty] = junk
    return out


def laid_out(data, layout):
    """(tensors, mask and cu_seqlens) as the doors take them, padded or packed with a mask."""
    if layout == "padded":
        return data, {"mask": MASK}
    flat = {k: v.flatten(0, 1) if k in TOKENS else v for k, v in data.items()}
    return flat, {"mask": MASK.reshape(-1), "cu_seqlens": CU}


def from_states(impl, single):
    def loss(d, where):
        module = LinearFlowRLLoss(impl=impl, single_pass=single, tis="token")
        return module(
            d["hidden"], d["weight"], d["target"], d["ref"], d["reward"], d["log_z"], logp_old=d["old"],
            logp_sampler=d["sampler"], temperature=d["temperature"], normalizer=3.0, **where,
        )  # fmt: skip

    return loss


def flow(impl, **settings):
    def loss(d, where):
        return flowrl_loss(
            d["logp"], d["ref"], d["reward"], d["log_z"], logp_old=d["old"], mask=where["mask"],
            cu_seqlens=where.get("cu_seqlens"), impl=impl, **settings,
        )  # fmt: skip

    return loss


def partition():
    module = LogPartition.as_released(H).eval()
    torch.nn.init.normal_(module.out.weight)
    return module


DOORS = {
    "one pass": from_states("chunked", True),
    "two passes": from_states("chunked", False),
    "flowrl reference": flow("reference"),
    "flowrl": flow("chunked"),
    "per token": flow("chunked", preset="token_log_z_beta30"),
    "per token reference": flow("reference", preset="token_log_z_beta30"),
    "joint": flow("chunked", preset="tb_ppo_style"),
    "dropped tokens": flow("chunked", preset="hard_cispo_drop"),
    "family": lambda d, where: residual_loss(d["logp"], d["reward"], anchor=d["ref"], log_z=d["log_z"], **where),
    "policy gradient": lambda d, where: policy_gradient_loss(
        d["logp"], d["old"], d["advantage"], kl=0.1, logp_ref=d["ref"], **where
    ),
    "GSPO": lambda d, where: policy_gradient_loss(d["logp"], d["old"], d["reward"], ratio="sequence", **where),
    "value": lambda d, where: (value_loss(d["value"], d["returns"], old_value=d["old"], clip=0.2, **where),),
    "log Z": lambda d, where: (partition()(d["states"], **where).square().sum(),),
}
LEAVES = ("hidden", "weight", "logp", "log_z", "value", "states")


def everything(door, data, where, scale=1.0):
    torch.manual_seed(0)
    own = {k: v.clone().requires_grad_() if k in LEAVES else v for k, v in data.items()}
    out = DOORS[door](own, where)
    grads = torch.autograd.grad(out[0] * scale, [own[k] for k in LEAVES], allow_unused=True)
    metrics = list(out[3].values()) if len(out) == 4 else []
    return [out[0].detach(), *out[1:3], *metrics], [g for g in grads if g is not None]


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("door", DOORS)
def test_what_stands_where_nothing_counts_reaches_nothing(door, layout):
    data = make()
    clean, clean_grads = everything(door, *laid_out(data, layout))
    assert clean_grads
    assert any(g.abs().sum() > 0 for g in clean_grads)
    for junk in JUNK:
        dirty, grads = everything(door, *laid_out(spoiled(data, junk), layout))
        assert all(torch.equal(a, b) for a, b in zip(clean, dirty))
        assert all(torch.equal(a, b) for a, b in zip(clean_grads, grads))


def test_rewards_and_values_of_no_token_reach_no_advantage():
    data = make()
    for junk in JUNK:
        dirty = spoiled(data, junk)
        pairs = [
            [advantages.gae(d["reward"], d["value"], MASK, gamma=0.9, lam=0.8, token_reward=d["advantage"])[0],
             advantages.reinforce_pp_advantage(d["reward"], MASK, token_reward=d["advantage"]),
             advantages.whiten(d["value"], MASK)]
            for d in (data, dirty)
        ]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*pairs))


def test_one_pass_computes_no_row_that_does_not_count(monkeypatch):
    rows, whole = [], tiles.logits_tile
    monkeypatch.setattr(tiles, "logits_tile", lambda h, *a: rows.append(h) or whole(h, *a))
    mask = torch.zeros(8, 128, dtype=torch.bool)
    mask[:, :16] = True
    x, w = torch.randn(8, 128, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
    target, ref = torch.zeros(8, 128, dtype=torch.long), torch.zeros(8, 128)
    LinearFlowRLLoss(impl="chunked")(x, w, target, ref, torch.ones(8), torch.zeros(8), mask=mask)
    assert sum(len(h) for h in rows) == 128, "an eighth of the rows, in whole blocks"


@pytest.mark.parametrize("scale", [1.0, 65536.0, 2.0**24])
@pytest.mark.parametrize("door", ["one pass", "two passes"])
def test_float16_keeps_its_digits_for_a_loss_scale_that_comes_later(door, scale):
    """normalizer = scale: the wanted gradient is that of a normaliser of 1, which float16 holds."""
    data = {k: v.half() if k in ("hidden", "weight") else v for k, v in make().items()}

    def run(d, impl, divisor, times):
        leaves = [d[k].clone().requires_grad_() for k in ("hidden", "weight", "log_z")]
        module = LinearFlowRLLoss(impl=impl, single_pass=door == "one pass")
        out = module(
            leaves[0], leaves[1], d["target"], d["ref"], d["reward"], leaves[2], logp_old=d["old"], mask=MASK,
            normalizer=divisor,
        )  # fmt: skip
        return torch.autograd.grad(out.loss * times, leaves)

    exact = run({k: v.double() if v.is_floating_point() else v for k, v in data.items()}, "chunked", 1.0, 1.0)
    for got, wanted in zip(run(data, "chunked", scale, scale), exact):
        assert_grad_close(got, wanted, rel=1e-3, row=0.01)


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_half_precision_log_probs_take_a_loss_scale_beyond_float16(impl):
    data = make()
    for dtype in (torch.float16, torch.bfloat16):
        logp, log_z = (data[k].to(dtype).requires_grad_() for k in ("logp", "log_z"))
        same = {**data, "logp": logp.detach().double(), "log_z": log_z.detach().double()}
        leaves = [same[k].requires_grad_() for k in ("logp", "log_z")]
        where = {"mask": MASK}
        out = flow(impl, normalizer=2.0**20)(
            {**data, "logp": logp, "log_z": log_z, "ref": data["ref"].to(dtype)}, where
        )
        want = flow("reference", normalizer=1.0)({**same, "ref": data["ref"].to(dtype).double()}, where)
        got = torch.autograd.grad(out.loss * 2.0**20, (logp, log_z))
        for a, b in zip(got, torch.autograd.grad(want.loss, leaves)):
            assert_grad_close(a, b, rel=1e-2 if dtype == torch.bfloat16 else 1e-3, row=0.05)


def hessian_product(impl, data, where, preset, old, towards, kind):
    leaves = [data[k].clone().requires_grad_() for k in ("logp", "log_z")]
    out = flowrl_loss(
        leaves[0], data["ref"], data["reward"], kind or leaves[1], logp_old=old, preset=preset, impl=impl,
        groups=torch.tensor([0, 0, 1, 0]), **where,
    )  # fmt: skip
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad(1.7 * out.loss, leaves, create_graph=True, **options)
    dot = sum((g * v).sum() for g, v in zip(grads, towards))
    return [g.detach() for g in grads], torch.autograd.grad(dot, leaves, **options)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("preset", ["paper", "phi_cosh", "group", "agro", "token_log_z_beta30", "tb"])
def test_second_derivatives_are_the_slope_of_the_first(preset, layout):
    data, where = laid_out(make(dtype=torch.float64), layout)
    kind = {"group": "group", "agro": "through"}.get(preset)
    draw = torch.Generator().manual_seed(5)
    towards = [torch.randn(data[k].shape, generator=draw, dtype=torch.float64) for k in ("logp", "log_z")]
    _, got = hessian_product("chunked", data, where, preset, None, towards, kind)
    if kind == "group":  # a detached mean: no slope of anything, but what the reference's autograd says
        wanted = hessian_product("reference", *laid_out(make(dtype=torch.float64), "padded"), preset, None,
                                 [towards[0].view(B, T), towards[1]], kind)[1]  # fmt: skip
        assert_grad_close(got[0].view(B, T), wanted[0], rel=1e-9)
        return
    step, around = 1e-5, []
    for move in (step, -step):
        moved = {**data, "logp": data["logp"] + move * towards[0], "log_z": data["log_z"] + move * towards[1]}
        around.append(hessian_product("chunked", moved, where, preset, None, towards, kind)[0])
    for have, high, low in zip(got, *around):
        if kind is None or have is got[0]:
            assert_grad_close(have, (high - low) / (2 * step), rel=1e-5)


@pytest.mark.parametrize("preset", ["paper", "tb_ppo_style", "hard_gspo_select", "token_old_anchor_no_log_z"])
def test_second_derivatives_of_rows_with_detached_parts_are_the_references(preset):
    data, where = laid_out(make(dtype=torch.float64), "padded")
    towards = [torch.ones_like(data["logp"]), torch.ones_like(data["log_z"])]
    no_ref = {**data, "ref": None} if preset.startswith("token_old") else data
    kind = None
    if preset.startswith("token_old"):
        no_ref = {**no_ref, "log_z": data["log_z"]}
    results = []
    for impl in ("chunked", "reference"):
        leaf = data["logp"].clone().requires_grad_()
        log_z = None if preset.startswith("token_old") else data["log_z"]
        out = flowrl_loss(
            leaf, no_ref["ref"], data["reward"], log_z, logp_old=data["old"], preset=preset, impl=impl, **where
        )
        (grad,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
        results.append(torch.autograd.grad((grad * towards[0]).sum(), leaf)[0])
    assert kind is None
    assert_grad_close(*results, rel=1e-9)


def test_what_has_no_second_or_forward_derivative_says_so():
    data, where = laid_out(make(), "padded")
    w = data["weight"].clone().requires_grad_()
    out = DOORS["one pass"]({**data, "weight": w}, where)
    with pytest.raises(RuntimeError, match="first derivatives only.*impl='reference'"):
        torch.autograd.grad(out.loss, w, create_graph=True)
    leaf = data["logp"].double().requires_grad_()
    out = flowrl_loss(leaf, data["ref"].double(), data["reward"].double(), data["log_z"].double(), impl="chunked")
    (first,) = torch.autograd.grad(out.loss, leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        torch.autograd.grad(first.square().sum(), leaf, create_graph=True)
    level = torch.autograd.forward_ad
    with level.dual_level():
        for name, door in (("logp", "flowrl"), ("log_z", "flowrl"), ("hidden", "one pass"), ("weight", "one pass")):
            tensors = {**data, "weight": w}
            tensors[name] = level.make_dual(data[name], torch.ones_like(data[name]))
            with pytest.raises(RuntimeError, match=f"{name}: forward-mode"):
                DOORS[door](tensors, where)
        dual = level.make_dual(data["logp"], torch.ones_like(data["logp"]))
        assert level.unpack_dual(DOORS["flowrl reference"]({**data, "logp": dual}, where).loss).tangent is not None


def test_functional_transforms_are_right_or_refused():
    data, where = laid_out(make(dtype=torch.float64), "padded")

    def loss(logp):
        return flow("chunked")({**data, "logp": logp}, where).loss

    leaf = data["logp"].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(leaf), leaf)
    for transform in (torch.func.grad(loss), torch.func.jacrev(loss)):
        try:
            got = transform(data["logp"])
        except RuntimeError:
            continue
        assert_grad_close(got, wanted, rel=1e-9)
    with pytest.raises(RuntimeError):
        torch.func.jvp(loss, (data["logp"],), (torch.ones_like(data["logp"]),))


@pytest.mark.parametrize("door", [d for d in DOORS if d != "log Z"])
def test_a_divisor_of_0_where_nothing_counts_gives_0(door, monkeypatch):
    data, zero = make(), MASK.sum() * 0
    monkeypatch.setitem(globals(), "MASK", torch.zeros_like(MASK))
    x = {k: v.clone().requires_grad_() if k in LEAVES else v for k, v in data.items()}
    where = {"mask": torch.zeros(B, T, dtype=torch.bool), "normalizer": torch.stack([zero, zero])}
    if door in ("policy gradient", "GSPO", "value"):
        where["normalizer"] = zero
    if door.startswith(("one", "two")):
        module = LinearFlowRLLoss(impl="chunked", single_pass=door == "one pass")
        out = module(x["hidden"], x["weight"], x["target"], x["ref"], x["reward"], x["log_z"], **where)
    elif "flowrl" in door or door in ("per token", "per token reference", "joint", "dropped tokens"):
        preset = {"per": "token_log_z_beta30", "joi": "tb_ppo_style", "dro": "hard_cispo_drop"}.get(door[:3])
        impl = "reference" if "reference" in door else "chunked"
        out = flowrl_loss(
            x["logp"], x["ref"], x["reward"], x["log_z"], logp_old=x["old"], preset=preset, impl=impl, **where
        )
    else:
        out = DOORS[door](x, where)
    assert out[0] == 0
    for g in torch.autograd.grad(out[0], [x[k] for k in LEAVES], allow_unused=True):
        assert g is None or (g == 0).all()


@pytest.mark.parametrize("impl", ["reference", "chunked"])
def test_a_loss_that_overflows_is_counted_as_not_finite(impl):
    data, where = laid_out(make(), "padded")
    for change in ({"log_z": torch.full((B,), 1e25)}, {}):
        settings = {} if change else {"normalizer": torch.tensor(0.0)}  # something counts: an error upstream
        out = flow(impl, **settings)({**data, **change}, where)
        assert not out.loss.isfinite()
        assert out.metrics["nonfinite"] >= 1
    assert flow(impl)(data, where).metrics["nonfinite"] == 0


def test_a_negative_divisor_on_a_device_becomes_nan():
    from flowrl_kernels import layout

    like = torch.ones(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "can_look", lambda _: False)
        assert layout.normalizer_of(torch.tensor(-2.0), like).isnan()
        assert layout.normalizer_of(torch.tensor([3.0, -2.0]), like, pair=True).isnan().tolist() == [False, True]


def test_k3_follows_its_formula_unless_it_is_bounded():
    def run(logp, ref, **settings):
        leaf = torch.tensor([[logp]], dtype=torch.float64, requires_grad=True)
        out = policy_gradient_loss(
            leaf, leaf.detach(), torch.zeros(1, dtype=torch.float64), kl=1.0, logp_ref=torch.full_like(leaf, ref),
            **settings,
        )  # fmt: skip
        return float(out.loss), float(torch.autograd.grad(out.loss, leaf)[0])

    assert run(-3.7, -0.7) == pytest.approx((math.e**3 - 4, 1 - math.e**3))
    assert run(-3.7, -0.7, kl_bound=10.0) == (10.0, 0.0)
    assert run(-3.0, -0.7, kl_bound=10.0) == pytest.approx((math.exp(2.3) - 3.3, 1 - math.exp(2.3)))
    value, slope = run(-900.0, 0.0)  # beyond 60 nats: the tangent
    assert value == pytest.approx(math.exp(60.0) * 841.0)
    assert slope == pytest.approx(-math.exp(60.0))


def test_no_older_policy_is_on_policy_and_cispo_counts_where_its_cap_binds():
    data, where = laid_out(make(), "padded")
    logp = data["logp"].clone().requires_grad_()
    same = policy_gradient_loss(logp, logp.detach(), data["reward"], **where)
    none = policy_gradient_loss(logp, None, data["reward"], **where)
    assert torch.equal(same.loss, none.loss)
    assert torch.equal(*(torch.autograd.grad(o.loss, logp)[0] for o in (same, none)))
    assert (none.weight[MASK.any(1)] == 1).all()
    new, old = torch.full((2, 1), math.log(2.0)), torch.zeros(2, 1)
    out = policy_gradient_loss(new, old, torch.tensor([1.0, -1.0]), ratio="detached", clip=(None, 1.28))
    assert out.metrics["clipped"] == 0.5


@pytest.mark.parametrize("single", [True, False])
def test_no_tokens_at_all_give_0(single):
    for shape, extra in (((0,), {"cu_seqlens": torch.tensor([0, 0, 0])}), ((2, 0), {})):
        h, w = torch.randn(*shape, H, requires_grad=True), torch.randn(V, H, requires_grad=True)
        nothing, each, ids = torch.zeros(shape), torch.ones(2), torch.zeros(shape, dtype=torch.long)
        z = torch.zeros(2, requires_grad=True)
        out = LinearFlowRLLoss(single_pass=single, impl="chunked")(h, w, ids, nothing, each, z, **extra)
        losses = [out.loss]
        for impl in ("reference", "chunked"):
            losses.append(flowrl_loss(nothing, nothing, each, z, impl=impl, **extra).loss)
        losses.append(policy_gradient_loss(nothing, None, each, **extra).loss)
        losses.append(value_loss(nothing, nothing, **extra))
        assert all(loss == 0 for loss in losses)
        assert all((g == 0).all() for g in torch.autograd.grad(out.loss, (h, w, z)))
        assert advantages.gae(each, nothing, nothing.bool(), **extra)[0].shape == shape


def test_a_constructor_refuses_what_its_call_would():
    for settings, error, message in (
        ({"betta": 3.0}, TypeError, "betta.*beta"),
        ({"scale": 1.0}, TypeError, "scale"),
        ({"level": "token"}, TypeError, "level"),
        ({"preset": "relaese"}, ValueError, "preset: .*'release'"),
        ({"preset": "release", "clip": "paper"}, ValueError, "clip: "),
        ({"ratio": None, "clip": (0.5, 2.0)}, ValueError, "clip: "),
        ({"beta": "3"}, TypeError, "beta: "),
        ({"impl": "fast"}, ValueError, "impl: "),
    ):
        for module in (FlowRLLoss, LinearFlowRLLoss):
            with pytest.raises(error, match=message):
                module(**settings)
    for settings, message in (({"temperature": 0.0}, "temperature: "), ({"epsilon": 1.0}, "epsilon: ")):
        with pytest.raises(ValueError, match=message):
            LinearFlowRLLoss(**settings)
    with pytest.raises(ValueError, match="dropout: "):
        LogPartition(8, dropout=-0.1)


def test_numbers_of_numpy_and_infinities_are_numbers():
    data, where = laid_out(make(), "padded")
    want = flow("chunked", beta=2.0, clip=(0.5, 2.0))(data, where).loss
    for two in (np.float64(2), np.float32(2), np.int64(2), torch.tensor(2.0)):
        assert flow("chunked", beta=two, clip=(np.float64(0.5), two))(data, where).loss == want
    open_end, none = (flow("chunked", clip=(0.5, high))(data, where).loss for high in (math.inf, None))
    assert open_end == none


def test_one_pass_fills_the_report_as_two_do_and_main_grad_wants_a_weight_that_learns():
    data, where = laid_out(make(), "padded")
    for single in (True, False):
        report, w = torch.full((3,), 9.0), data["weight"].clone().requires_grad_()
        loss = LinearFlowRLLoss(single_pass=single, impl="chunked")(
            data["hidden"], w, data["target"], data["ref"], data["reward"], data["log_z"], report=report, **where
        ).loss
        loss.backward()
        assert report.tolist() == [0.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="main_grad: "):
        LinearFlowRLLoss()(
            data["hidden"], data["weight"], data["target"], data["ref"], data["reward"], data["log_z"],
            main_grad=torch.zeros(V, H), **where,
        )  # fmt: skip


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("name", ["logit_scale", "softcap"])
def test_a_learned_scale_of_the_head_is_refused_because_it_would_not_learn(name, single):
    data, where = laid_out(make(), "padded")
    with pytest.raises(ValueError, match=f"{name}: "):
        LinearFlowRLLoss(single_pass=single)(
            data["hidden"], data["weight"], data["target"], data["ref"], data["reward"], data["log_z"],
            **{name: torch.nn.Parameter(torch.tensor(30.0))}, **where,
        )  # fmt: skip


def test_many_betas_compile_few_times():
    data, where = laid_out(make(), "padded")
    frames = []

    def count(graph, inputs):
        frames.append(graph)
        return graph.forward

    def loss(logp, beta):
        return flow("chunked", beta=beta)({**data, "logp": logp}, where).loss

    torch._dynamo.reset()
    compiled = torch.compile(loss, backend=count, fullgraph=True)
    for i in range(14):
        assert compiled(data["logp"], 1.0 + i) == loss(data["logp"], 1.0 + i)
    assert len(frames) <= 3


def test_group_statistics_take_memory_in_proportion_to_the_batch():
    draw = torch.Generator().manual_seed(0)
    b = 40_000  # [B, B] float64 would be 12.8 GB
    reward, groups = torch.randn(b, generator=draw), torch.randint(b // 8, (b,), generator=draw)
    for got in (
        advantages.group_normalize(reward, groups), advantages.leave_one_out(reward, groups),
        advantages.reinforce_rej(reward, groups), advantages.unlikeliness_reward(reward, reward, groups),
    ):  # fmt: skip
        some = groups == groups[7]
        alone = {0: advantages.group_normalize, 1: advantages.leave_one_out}
        assert got.shape == (b,)
    for function in alone.values():
        assert torch.equal(function(reward, groups)[some], function(reward[some], groups[some]))
    ranks = advantages.unlikeliness_reward(
        torch.ones(5), torch.tensor([3.0, 1, 2, 1, 9]), torch.tensor([4, 4, 4, 4, 0])
    )
    torch.testing.assert_close(ranks, 1 - 0.25 * torch.tensor([3 / 4, 0, 2 / 4, 1 / 4, 0]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.99, 0.95)])
def test_the_recursion_over_tokens_takes_no_step_a_token(gamma, lam):
    reward, value = torch.ones(1, dtype=torch.float64), torch.randn(1, 2000, dtype=torch.float64)
    with torch.profiler.profile() as seen:
        advantage, _ = advantages.gae(reward, value, torch.ones(1, 2000), gamma=gamma, lam=lam)
    assert sum(event.count for event in seen.key_averages()) < 1500
    running, wanted = 0.0, []
    for t in reversed(range(2000)):
        following = float(value[0, t + 1]) if t < 1999 else 0.0
        running = float(t == 1999) + gamma * following - float(value[0, t]) + gamma * lam * running
        wanted.append(running)
    torch.testing.assert_close(advantage[0], torch.tensor(wanted[::-1], dtype=torch.float64), rtol=1e-12, atol=1e-12)
