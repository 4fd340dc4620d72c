"""What stands where nothing counts reaches nothing: every door, clean against NaN, inf and 1e38, to the bit."""

import pytest
import torch
import torch.distributed as dist
from poison import VALUES, assert_unmoved
from poison import poison as poison_with
from ranks import on_ranks

from flowrl_kernels import (
    LinearFlowRLLoss,
    LogPartition,
    advantages,
    flowrl_loss,
    linear_logprob,
    logprob,
    policy_gradient_loss,
    residual_loss,
    value_loss,
)
from flowrl_kernels.presets import PRESETS
from flowrl_kernels.testing import cu_seqlens_of, ragged_mask

B, T, H, V = 6, 7, 12, 50
MASK = ragged_mask(B, T, seed=3)  # row B // 2 is empty
USED = MASK.any(1)
GROUPS = torch.tensor([0, 0, 1, 1, 2, 2])
IMPLS = ["reference", "chunked"]
SCALED = {"softcap": 8.0, "logit_scale": 1.3}
LAYOUTS = ["padded", "packed"]


def made(seed=0):
    make = torch.Generator().manual_seed(seed)

    def tokens(shift=0.0, scale=0.3):
        return -1.5 + shift + scale * torch.randn(B, T, generator=make)

    logp = tokens()
    near = {name: logp + 0.2 * torch.randn(B, T, generator=make) for name in ("old", "sampler", "ref")}
    each = {name: torch.randn(B, generator=make) for name in ("reward", "log_z")}
    return {"logp": logp, **near, **each}


def laid(tensor, layout):
    """[B, T, ...] as it is, or as packed tokens; what is per sequence stays."""
    if layout == "padded" or tensor is None or tensor.dim() < 2:
        return tensor
    return tensor.reshape(B * T, *tensor.shape[2:])


def where(layout):
    """The arguments that say which tokens count: packed sequences are T slots each, with the mask inside."""
    if layout == "padded":
        return {"mask": MASK}, MASK
    return {"mask": MASK.flatten(), "cu_seqlens": torch.arange(0, B * T + 1, T)}, MASK.flatten()


def both(run, tensors, layout, poison, wanted):
    """run(tensors, place) -> named results; once clean, once poisoned. `wanted`: whose gradients are compared."""
    place, mask = where(layout)
    outs = []
    for spoil in (None, poison):
        given = {}
        for name, tensor in tensors.items():
            flat = laid(tensor, layout).clone()
            if spoil is not None:
                flat = spoil(flat, mask if flat.shape[: mask.dim()] == mask.shape else USED)
            given[name] = flat.requires_grad_(name in wanted)
        out = run(given, place)
        loss = out["loss"]
        grads = torch.autograd.grad(loss, [given[name] for name in wanted])
        outs.append({**out, **{f"d{name}": grad for name, grad in zip(wanted, grads)}})
    masks = {f"d{n}": mask for n in wanted if laid(tensors[n], layout).shape[: mask.dim()] == mask.shape}
    assert_unmoved(*outs, masks)


def named(out):
    return {"loss": out.loss, "residual": out.residual, "weight": out.weight, **out.metrics}


ROWS = [
    "paper", "tb", "group", "contrastive_tb", "release_tis_token", "hard_gspo_select", "hard_cispo_drop",
    "tb_ppo_style", "token_old_anchor_no_log_z", "token_log_z_beta30", "phi_exp", "release_no_anchor_no_log_z",
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("preset", ROWS)
def test_the_flow_loss(preset, impl, layout, poison):
    row = PRESETS[preset]
    learned = row.log_z == "learned"

    def run(given, place):
        return named(
            flowrl_loss(
                given["logp"], given["ref"] if row.anchor == "ref" else None, given["reward"],
                given["log_z"] if learned else ..., logp_old=given["old"],
                logp_sampler=given["sampler"] if row.tis else None, groups=GROUPS, preset=preset, impl=impl, **place,
            )
        )  # fmt: skip

    both(run, made(), layout, poison, ["logp", "log_z"] if learned else ["logp"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("center", [None, "detached", "through"])
def test_the_family_by_its_own_door(center, layout, poison):
    penalty = {None: 0.0, "detached": "square", "through": 1.3}[center]

    def run(given, place):
        return named(
            residual_loss(
                given["logp"], given["reward"], anchor=given["ref"], center=center, groups=GROUPS, phi=penalty, **place
            )
        )

    both(run, made(), layout, poison, ["logp"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", ["token", "sequence", "detached", "none"])
@pytest.mark.parametrize(("aggregate", "per_token"), [("token-mean", True), ("seq-mean-token-sum-norm", False)])
def test_policy_gradients(ratio, aggregate, per_token, layout, poison):
    tensors = made()
    if per_token:
        tensors["reward"] = torch.randn(B, T, generator=torch.Generator().manual_seed(8))
    bounds = {"dual_clip": 2.0} if ratio in ("token", "sequence") else {}
    bounds |= {"horizon": 9} if aggregate == "seq-mean-token-sum-norm" else {}

    def run(given, place):
        return named(
            policy_gradient_loss(
                given["logp"], given["old"], given["reward"], ratio=ratio, aggregate=aggregate, kl=0.1,
                logp_ref=given["ref"], **bounds, **place,
            )
        )  # fmt: skip

    both(run, tensors, layout, poison, ["logp"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_value_loss(clip, layout, poison):
    def run(given, place):
        old = given["old"] if clip else None
        return {"loss": value_loss(given["logp"], given["ref"], old_value=old, clip=clip, **place)}

    both(run, made(), layout, poison, ["logp"])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["reference", "one pass", "two passes", "bounded"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "settings", [{}, {"softcap": 8.0, "logit_scale": 1.3, "temperature": 0.7}], ids=["plain", "scaled"]
)
def test_the_loss_from_hidden_states(way, dtype, settings, layout, poison):
    make = torch.Generator().manual_seed(4)
    weight = torch.randn(V, H, generator=make).to(dtype).requires_grad_()
    bias = torch.randn(V, generator=make).to(dtype).requires_grad_()
    tensors = {k: v for k, v in made().items() if k != "logp"}
    tensors["hidden"] = torch.randn(B, T, H, generator=make).to(dtype)
    tensors["target"] = torch.randint(V, (B, T), generator=make)
    loss = LinearFlowRLLoss(
        single_pass=way == "one pass",
        epsilon=0.01 if way == "bounded" else 0.0,
        impl="reference" if way == "reference" else "chunked",
    )

    def run(given, place):
        target = given["target"].detach()
        out = loss(
            given["hidden"], weight, target, given["ref"], given["reward"], given["log_z"], logp_old=given["old"],
            bias=bias, **settings, **place,
        )  # fmt: skip
        dweight, dbias = torch.autograd.grad(out.loss, (weight, bias), retain_graph=True)
        return {**named(out), "dweight": dweight, "dbias": dbias}

    both(run, tensors, layout, poison, ["hidden", "log_z"])


WAYS = {
    "reference": {"impl": "reference"},
    "chunked": {"impl": "chunked"},
    "bounded": {"impl": "chunked", "epsilon": 0.01},
    "kept": {"kept": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [{}, SCALED], ids=["plain", "scaled"])
def test_ignored_rows_of_the_primitive(way, dtype, settings, poison):
    make = torch.Generator().manual_seed(4)
    n = 30
    hidden, weight = torch.randn(n, H, generator=make).to(dtype), torch.randn(V, H, generator=make).to(dtype)
    bias, target = torch.randn(V, generator=make).to(dtype), torch.randint(V, (n,), generator=make)
    counts = torch.rand(n, generator=make) < 0.6
    target = target.masked_fill(~counts, -100)
    grad, grad_entropy = torch.randn(n, generator=make), torch.randn(n, generator=make)
    more = dict(WAYS[way])
    if more.pop("kept", False):
        more["kept"] = (torch.randint(V, (3 * n,), generator=make).unique_consecutive(), None)
        ids = torch.stack([torch.randperm(V, generator=make)[:3] for _ in range(n)]).flatten()
        more["kept"] = (ids, torch.arange(0, 3 * n + 1, 3))
    outs = []
    for spoil in (lambda t, mask: t.clone(), poison):
        x = spoil(hidden, counts).requires_grad_()
        w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
        out = linear_logprob(x, w, target, bias=b, entropy=True, **settings, **more)
        grads = torch.autograd.grad(
            (out.logp, out.entropy), (x, w, b), (spoil(grad, counts), spoil(grad_entropy, counts))
        )
        outs.append({"logp": out.logp, "entropy": out.entropy, **dict(zip(("dhidden", "dweight", "dbias"), grads))})
    assert_unmoved(*outs, {"dhidden": counts, "logp": counts, "entropy": counts})


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_ignored_rows_of_logits(impl, softcap, poison):
    make = torch.Generator().manual_seed(6)
    logits, target = torch.randn(9, V, generator=make), torch.randint(V, (9,), generator=make)
    counts = torch.arange(9) % 3 != 1
    target = target.masked_fill(~counts, -100)
    outs = []
    for spoil in (lambda t, mask: t.clone(), poison):
        z = spoil(logits, counts).requires_grad_()
        out = logprob(z, target, entropy=True, softcap=softcap, impl=impl)
        (dz,) = torch.autograd.grad(out.logp.sum() + 0.5 * out.entropy.sum(), z)
        outs.append({"logp": out.logp, "entropy": out.entropy, "dlogits": dz})
    assert_unmoved(*outs, {"dlogits": counts, "logp": counts, "entropy": counts})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_partition_network(layout, poison):
    net = LogPartition(H, layers=2)
    with torch.no_grad():
        net.out.weight.normal_(generator=torch.Generator().manual_seed(1))
    tensors = {"hidden": torch.randn(B, T, H, generator=torch.Generator().manual_seed(2))}

    def run(given, place):
        out = net(given["hidden"], **place)
        grads = torch.autograd.grad(out.square().sum(), list(net.parameters()), retain_graph=True)
        return {"loss": out.square().sum(), "log_z": out, **{f"p{i}": g for i, g in enumerate(grads)}}

    both(run, tensors, layout, poison, ["hidden"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_advantages(layout, poison):
    place, mask = where(layout)
    boundaries = {k: v for k, v in place.items() if k == "cu_seqlens"}
    raw = made()
    outs = []
    for spoil in (None, poison):
        value, paid = (laid(raw[name], layout) for name in ("logp", "old"))
        reward = raw["reward"]
        if spoil is not None:
            value, paid, reward = spoil(value, mask), spoil(paid, mask), spoil(reward, USED)
        advantage, returns = advantages.gae(reward, value, mask, gamma=0.9, lam=0.8, token_reward=paid, **boundaries)
        plus = advantages.reinforce_pp_advantage(reward, mask, gamma=0.9, token_reward=paid, **boundaries)
        white = advantages.whiten(value, mask)
        outs.append({"advantage": advantage, "returns": returns, "plus": plus, "white": white})
    assert_unmoved(*outs, dict.fromkeys(outs[0], mask))


def over_ranks(rank, world):
    """A split head, and sequences that are split: the same bits on both ranks whatever stands in unused slots."""
    make = torch.Generator().manual_seed(4)
    n = 20
    hidden, weight = torch.randn(n, H, generator=make), torch.randn(V, H, generator=make)
    counts = torch.rand(n, generator=make) < 0.6
    target = torch.randint(V, (n,), generator=make).masked_fill(~counts, -100)
    tensors, half = made(), slice(0, 4) if rank == 0 else slice(4, T)
    for value in VALUES.values():
        outs, masks = [], {"dhidden": counts, "dlogp": MASK[:, half]}
        for spoil in (lambda t, mask: t.clone(), poison_with(value)):
            x = spoil(hidden, counts).requires_grad_()
            w = weight[:20].clone() if rank == 0 else weight[20:].clone()
            out = linear_logprob(x, w.requires_grad_(), target, vocab_parallel=dist.group.WORLD, entropy=True)
            dx, dw = torch.autograd.grad(out.logp.sum() + out.entropy.sum(), (x, w))
            logp, ref, old = (spoil(tensors[k][:, half], MASK[:, half]) for k in ("logp", "ref", "old"))
            flow = flowrl_loss(
                logp.requires_grad_(), ref, spoil(tensors["reward"], USED), spoil(tensors["log_z"], USED),
                logp_old=old, mask=MASK[:, half], cp_group=dist.group.WORLD,
            )  # fmt: skip
            (dlogp,) = torch.autograd.grad(flow.loss, logp)
            outs.append({"logp": out.logp, "dhidden": dx, "dweight": dw, **named(flow), "dlogp": dlogp})
        assert_unmoved(*outs, masks)


@pytest.mark.distributed
def test_what_is_split_over_ranks():
    on_ranks(over_ranks, 2)


def test_packed_sequences_of_their_own_lengths(poison):
    """No mask: the boundaries say it all, and what stands behind the last one is refused, not read."""
    lengths = MASK.sum(1)
    packed = {k: (v[MASK] if v.dim() == 2 else v) for k, v in made().items()}
    outs = []
    for spoil in (lambda t, mask: t.clone(), poison):
        logp = packed["logp"].clone().requires_grad_()
        reward, log_z = spoil(packed["reward"], USED), spoil(packed["log_z"], USED)
        out = flowrl_loss(logp, packed["ref"], reward, log_z, logp_old=packed["old"], cu_seqlens=cu_seqlens_of(lengths))
        outs.append({**named(out), "dlogp": torch.autograd.grad(out.loss, logp)[0]})
    assert_unmoved(*outs)
