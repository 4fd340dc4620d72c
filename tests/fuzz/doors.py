"""One door a function: draws a call, and either it agrees with float64 or it is refused by name.

Each returns "agreed" or "refused"; anything else is an error of the library.
"""

import itertools

import torch

from flowrl_kernels import (
    FlowRLLoss,
    LinearFlowRLLoss,
    LogPartition,
    flowrl_loss,
    policy_gradient_loss,
    residual_loss,
    rollout_correction,
    value_loss,
)
from flowrl_kernels.core.correction import DEFAULTS
from flowrl_kernels.presets import PRESETS

from .draws import BUDGET, FLOATS, OUT, attempt, close, corrupt, finite, outcome


def tokens_of(d):
    """Layout: (shape of tokens, arguments, which count [the tokens' shape], sequences that have any [B])."""
    num, width = d.of(0, 1, 2, 3, 5), d.of(0, 1, 2, 6)
    if d.chance(50):
        mask = torch.rand(num, width, generator=d.make) < 0.7
        if d.chance(30):
            return (num, width), {}, torch.ones(num, width, dtype=torch.bool), torch.full((num,), width > 0)
        given = mask.to(d.of(torch.bool, torch.uint8, torch.int64, torch.float32))
        return (
            (num, width),
            {"mask": d.laid(given, same=True)},
            mask,
            mask.any(1) if width else torch.zeros(num, dtype=torch.bool),
        )
    lengths = torch.randint(0, max(1, width) + 1, (num,), generator=d.make)
    edges = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(d.of(torch.int64, torch.int32))
    total = int(lengths.sum())
    mask = torch.ones(total, dtype=torch.bool)
    place = {"cu_seqlens": edges}
    if d.chance(40):
        mask = torch.rand(total, generator=d.make) < 0.7
        place["mask"] = mask
    used = torch.tensor([bool(mask[a:b].any()) for a, b in itertools.pairwise(edges.tolist())], dtype=torch.bool)
    return (total,), place, mask, used.reshape(num)


def flow_settings(d):
    if d.chance(50):
        name = d.of(*sorted(PRESETS))
        row = PRESETS[name]
        return {"preset": name}, row.anchor, row.log_z, row.tis
    out = {}
    options = {
        "beta": (15.0, 1.0, 0.0, -2.0), "ratio": ("sum", "mean", None), "anchor": ("ref", "old", None),
        "clip": ("paper", "release", (0.8, 1.2), (None, None), (0.0, 1.0), (None, 2), [0.5, None]),
        "phi": ("square", "exp", "exp_half", "cosh", "abs", 0.0, 1, 0.5, 1.0001, -1.0, 3.0),
        "tis": ("token", "mean", "sequence", None),
        "tis_cap": (2.0, 1.0), "length_normalize": (True, False),
    }  # fmt: skip
    for name, values in options.items():
        if d.chance(30):
            out[name] = d.of(*values)
    if out.get("tis") is None and d.chance(80):
        out.pop("tis_cap", None)
    if out.get("ratio", "") is None and d.chance(80):
        out.pop("clip", None)
    return out, out.get("anchor", "ref"), "learned", out.get("tis")


def normalizers(d, num):
    return d.of(
        None, None, num + 1, 2.5, torch.tensor(3.0), torch.tensor([3.0, 9.0]), (4.0, 11.0), torch.tensor(0),
        torch.tensor(2, dtype=torch.int32),
    )  # fmt: skip


def doubled(arguments, masks):
    """The same call in float64 with zeros where nothing counts."""
    out = {}
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in ("mask", "normalizer"):
            counts = masks.get(name)
            value = value.detach().double()
            out[name] = value if counts is None else torch.where(counts, value, 0.0)
        else:
            out[name] = value
    return out


def compare_losses(d, function, arguments, masks, leaves, nonsense, impl, rel=2e-5):
    """`function(**arguments)` against itself in float64 by the reference, gradients too."""
    original = dict(arguments)

    def call(given, **more):
        given = dict(given)
        fresh = []
        for name in leaves:
            if isinstance(given.get(name), torch.Tensor) and given[name].is_floating_point():
                given[name] = given[name].detach().requires_grad_()
                fresh.append(given[name])
        out = function(**given, **more)
        loss = out if isinstance(out, torch.Tensor) else out.loss
        grads = torch.autograd.grad(loss, fresh, allow_unused=True) if loss.requires_grad else [None] * len(fresh)
        return out, grads

    names = ("log_z", "groups", "logp_ref", "logp_old", "logp_sampler", "normalizer", "horizon", "old_value", "anchor",
             "tis", "clip", "kl", "temperature")  # fmt: skip
    got = attempt(lambda: call(arguments), [*arguments, *names])
    if outcome(got, nonsense is True) == "refused":
        return "refused"
    if nonsense is None:
        return "agreed"
    counted = [
        value if masks.get(n) is None else value[masks[n]]
        for n, value in original.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and n != "mask"
    ]
    out, grads = got
    loss = out if isinstance(out, torch.Tensor) else out.loss
    divisor, place = original.get("normalizer"), next(iter(masks.values()))
    nothing = isinstance(divisor, torch.Tensor) and bool((divisor == 0).any()) and bool(place.any())  # x / 0
    if nothing or not finite(*counted):
        if not loss.isfinite() and not isinstance(out, torch.Tensor) and "nonfinite" in out.metrics:
            assert out.metrics["nonfinite"] > 0, "loss is not finite and metrics say that all is well"
        return "agreed"
    want, wanted = call(doubled(original, masks), **({"impl": "reference"} if impl else {}))
    first = next(v for v in original.values() if isinstance(v, torch.Tensor) and v.is_floating_point())
    rel = 1e-9 if first.dtype == torch.float64 else rel
    pairs = {"loss": (loss, want if isinstance(want, torch.Tensor) else want.loss)}
    if not isinstance(out, torch.Tensor):
        pairs |= {n: (getattr(out, n), getattr(want, n)) for n in ("residual", "weight")}
    for name, (mine, theirs) in pairs.items():
        close(name, mine.detach(), theirs.detach().double(), rel)
    names = [n for n in leaves if isinstance(original.get(n), torch.Tensor)]
    largest = max([1.0, *(float(g.abs().max()) for g in wanted if g is not None and g.numel() and g.isfinite().all())])
    for name, mine, theirs in zip(names, grads, wanted):
        if theirs is None:
            assert mine is None or (mine == 0).all(), f"d{name}: a gradient where there is none"
            continue
        if mine is None:
            assert (theirs == 0).all(), f"d{name}: no gradient where there is one"
            continue
        if first.dtype != torch.float64 and mine.dtype == torch.float64:
            mine = mine.float()  # log_z's, beside narrower log-probs: it was computed as theirs
        assert not mine.isnan().any(), f"d{name}: NaN from finite input"
        if masks.get(name) is not None:
            assert (mine[~masks[name]] == 0).all(), f"d{name}: gradient where nothing counts"
        budget = max(rel, BUDGET[mine.dtype] if mine.dtype.itemsize == 2 else OUT[mine.dtype])
        # a head whose rows are all alike has a gradient of 0, made of terms as large as the other gradients
        close(f"d{name}", mine, theirs, budget, floor=1e-4 * largest if name == "hidden" else 1e-6)
    return "agreed"


def token_values(d, shape, mask, dtype=None, near=None):
    dtype = dtype or d.of(*FLOATS)
    value = d.normal(shape, dtype, 0.5, -1.5)
    if near is not None:
        value = (near.double() + d.normal(shape, torch.float64, 0.2)).to(dtype)
    return d.spice(d.junk(value, mask), percent=10)


def door_flowrl_loss(d, function=flowrl_loss):
    shape, place, mask, used = tokens_of(d)
    settings, anchor, log_z, tis = flow_settings(d)
    num = len(used)
    logp = token_values(d, shape, mask)
    arguments = {
        "logp": logp, "logp_ref": token_values(d, shape, mask, near=logp) if anchor == "ref" else None,
        "reward": d.spice(d.junk(d.normal((num,), d.of(*FLOATS)), used), percent=10), **place, **settings,
    }  # fmt: skip
    if log_z == "learned":
        arguments["log_z"] = d.of(d.junk(d.normal((num,), d.of(*FLOATS)), used), None, "group", "through")
    if d.chance(85):
        arguments["logp_old"] = token_values(d, shape, mask, near=logp)
    if d.chance(90 if tis else 5):
        arguments["logp_sampler"] = token_values(d, shape, mask, near=logp)
    if d.chance(80):
        arguments["groups"] = d.ids((num,), 3, d.of(torch.int64, torch.int32, torch.uint8))
    if (divisor := normalizers(d, num)) is not None:
        arguments["normalizer"] = divisor
    before = dict(arguments)
    nonsense = corrupt(d, arguments, ("log_z", "logp_ref", "logp_old", "logp_sampler", "groups", "mask", "cu_seqlens"))
    if not nonsense and any(arguments[k] is not v for k, v in before.items()):
        nonsense = None
    masks = dict.fromkeys(("logp", "logp_ref", "logp_old", "logp_sampler"), mask) | {"reward": used, "log_z": used}
    return compare_losses(d, function, arguments, masks, ("logp", "log_z"), nonsense, True)


def module_call(logp, logp_ref, reward, log_z=..., **given):
    names = ("preset", "beta", "ratio", "clip", "length_normalize", "anchor", "phi", "tis", "tis_cap", "impl")
    settings = {k: given.pop(k) for k in names if k in given}
    return FlowRLLoss(**settings)(logp, logp_ref, reward, log_z, **given)


def door_FlowRLLoss(d):
    return door_flowrl_loss(d, module_call)


def door_residual_loss(d):
    shape, place, mask, used = tokens_of(d)
    num = len(used)
    logp = token_values(d, shape, mask)
    arguments = {"logp": logp, "target": d.spice(d.junk(d.normal((num,), d.of(*FLOATS)), used), percent=10), **place}
    options = {
        "anchor": lambda: token_values(d, shape, mask, near=logp),
        "logp_old": lambda: token_values(d, shape, mask, near=logp),
        "groups": lambda: d.ids((num,), 3), "log_z": lambda: d.normal((num,), d.of(*FLOATS)),
        "scale": lambda: d.of(1.0, 0.1, None), "center": lambda: d.of("detached", "through"),
        "ratio": lambda: d.of("sum", "mean", None), "clip": lambda: d.of("paper", (0.5, 2.0)),
        "phi": lambda: d.of("square", "exp", "abs", 0.0, 1.0, 1.3), "level": lambda: d.of("sequence", "token"),
        "normalizer": lambda: normalizers(d, num), "preset": lambda: d.of(*sorted(PRESETS)),
    }  # fmt: skip
    for name, made in options.items():
        if d.chance(30):
            arguments[name] = made()
    if d.chance(80):  # what goes together
        row = PRESETS[arguments["preset"]] if "preset" in arguments else None
        for name in ("scale", "ratio", "clip", "phi", "level", "center") if row else ():
            arguments.pop(name, None)
        if row and row.anchor is None:
            arguments.pop("anchor", None)
        elif row or "anchor" in arguments:
            arguments["anchor"] = options["anchor"]()
        if row and row.log_z == "learned":
            arguments["log_z"] = options["log_z"]()
        elif row or "center" in arguments:
            arguments.pop("log_z", None)
        if "center" in arguments or (row and row.log_z in ("group", "through")):
            arguments["groups"] = options["groups"]()
        if "clip" in arguments and "ratio" not in arguments:
            arguments["ratio"] = "sum"
        if arguments.get("ratio") or row:
            arguments["logp_old"] = options["logp_old"]()
    before = dict(arguments)
    nonsense = corrupt(d, arguments, ("anchor", "logp_old", "groups", "log_z", "mask", "cu_seqlens", "normalizer"))
    if not nonsense and any(arguments[k] is not v for k, v in before.items()):
        nonsense = None
    masks = dict.fromkeys(("logp", "anchor", "logp_old"), mask) | {"target": used, "log_z": used}
    return compare_losses(d, residual_loss, arguments, masks, ("logp", "log_z"), nonsense, True)


def door_policy_gradient_loss(d):
    shape, place, mask, used = tokens_of(d)
    num = len(used)
    logp = token_values(d, shape, mask)
    per_token = d.chance(50)
    advantage = token_values(d, shape, mask) if per_token else d.spice(d.junk(d.normal((num,), d.of(*FLOATS)), used))
    arguments = {"logp": logp, "logp_old": token_values(d, shape, mask, near=logp), "advantage": advantage, **place}
    options = {
        "clip": lambda: d.of((0.8, 1.28), (None, None), (None, 1.1), (0.9, None)), "dual_clip": lambda: d.of(3.0, None),
        "ratio": lambda: d.of("token", "sequence", "detached", "none"), "kl": lambda: d.of(0.1, 0.0, None),
        "kl_kind": lambda: d.of("k1", "k2", "k3"), "logp_ref": lambda: token_values(d, shape, mask, near=logp),
        "aggregate": lambda: d.of("seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"),
        "normalizer": lambda: normalizers(d, num), "horizon": lambda: d.of(7, 1),
    }  # fmt: skip
    for name, made in options.items():
        if d.chance(35):
            arguments[name] = made()
    before = dict(arguments)
    nonsense = corrupt(d, arguments, ("logp_old", "logp_ref", "mask", "cu_seqlens", "normalizer"))
    if not nonsense and any(arguments[k] is not v for k, v in before.items()):
        nonsense = None
    masks = dict.fromkeys(("logp", "logp_old", "logp_ref"), mask) | {"advantage": mask if per_token else used}
    if not per_token and tuple(shape) == (num,):
        masks["advantage"] = mask  # one a sequence, or one a token: packed tokens read it as the latter
    return compare_losses(d, policy_gradient_loss, arguments, masks, ("logp",), nonsense, False)


def door_rollout_correction(d):
    shape, place, mask, _ = tokens_of(d)
    old = token_values(d, shape, mask, d.of(torch.float32, torch.float64))
    arguments = {"logp_old": old, "logp_sampler": token_values(d, shape, mask, old.dtype, near=old), **place}
    if d.chance(80):
        arguments["correction"] = d.of(*DEFAULTS, "token_truncate+seq_mean_k1", "tokens", None, 3)
    if d.chance(60):
        arguments["correction_cap"] = d.of(2.0, (0.5, 2.0), (None, 1.1), "0.5_2.0", "1.1,0.9_1.2", -1.0, "x", 0.05)
    before = dict(arguments)
    nonsense = corrupt(d, arguments, ("logp_sampler", "mask", "cu_seqlens"))
    got = attempt(lambda: rollout_correction(**arguments), [*arguments, "correction", "correction_cap"])
    if outcome(got, nonsense is True) == "refused" or any(arguments[k] is not v for k, v in before.items()):
        return "refused" if got is None else "agreed"
    wide = {k: torch.where(mask, before[k].double(), 0.0) for k in ("logp_old", "logp_sampler")}
    if not finite(*wide.values()):
        return "agreed"
    want = rollout_correction(**{**before, **wide})
    assert (got.weight[~mask] == 0).all(), "weight: not 0 where nothing counts"
    assert not got.keep[~mask].any(), "keep: True where nothing counts"
    same = got.keep == want.keep  # a ratio at a bound may fall on either side in float32
    assert same.double().mean() > 0.9 or same.numel() < 20, "keep: other tokens than in float64"
    if not any(how in str(before.get("correction")) for how in ("mask", "k1", "k2", "k3")):
        close("weight", got.weight, want.weight, 1e-5)
    for name in ("mismatch_kl", "mismatch_max"):
        close(name, got.metrics[name], want.metrics[name], 1e-4, floor=1e-5)
    return "agreed"


def door_value_loss(d):
    shape, place, mask, _ = tokens_of(d)
    value = token_values(d, shape, mask)
    arguments = {"value": value, "returns": token_values(d, shape, mask), **place}
    if d.chance(50):
        arguments |= {"old_value": token_values(d, shape, mask, near=value), "clip": d.of(0.1, 0.5)}
    if d.chance(40):
        arguments["aggregate"] = d.of("token-mean", "seq-mean-token-mean", "seq-mean-token-sum")
    if d.chance(30):
        arguments["normalizer"] = normalizers(d, 3)
    before = dict(arguments)
    nonsense = corrupt(d, arguments, ("old_value", "mask", "cu_seqlens", "normalizer"))
    if not nonsense and any(arguments[k] is not v for k, v in before.items()):
        nonsense = None
    masks = dict.fromkeys(("value", "returns", "old_value"), mask)
    return compare_losses(d, value_loss, arguments, masks, ("value",), nonsense, False)


def linear_call(hidden, weight, target, logp_ref, reward, log_z=..., *, single_pass, loss_temperature, **given):
    names = ("preset", "beta", "ratio", "clip", "length_normalize", "anchor", "phi", "tis", "tis_cap", "impl")
    settings = {k: given.pop(k) for k in names if k in given}
    module = LinearFlowRLLoss(single_pass=single_pass, temperature=loss_temperature, **settings)
    return module(hidden, weight, target, logp_ref, reward, log_z, **given)


def door_LinearFlowRLLoss(d):
    shape, place, mask, used = tokens_of(d)
    settings, anchor, log_z, tis = flow_settings(d)
    num, hidden_size, vocabulary, dtype = len(used), d.of(1, 3, 8), d.of(2, 9, 130), d.of(*FLOATS)
    like = d.normal(shape, torch.float32, 0.5, -2.0)
    arguments = {
        "hidden": d.junk(d.normal((*shape, hidden_size), dtype), mask),
        "weight": d.normal((vocabulary, hidden_size), dtype),
        "target": d.junk(d.ids(shape, vocabulary, d.of(torch.int64, torch.int32)), mask),
        "logp_ref": token_values(d, shape, mask, torch.float32, near=like) if anchor == "ref" else None,
        "reward": d.junk(d.normal((num,)), used), **place, **settings, "single_pass": d.chance(60),
        "loss_temperature": d.of(1.0, 0.7),
    }  # fmt: skip
    if log_z == "learned":
        arguments["log_z"] = d.of(d.junk(d.normal((num,)), used), None)
    if d.chance(85):
        arguments["logp_old"] = token_values(d, shape, mask, torch.float32, near=like)
    if d.chance(90 if tis else 5):
        arguments["logp_sampler"] = token_values(d, shape, mask, torch.float32, near=like)
    if d.chance(80):
        arguments["groups"] = d.ids((num,), 3)
    if d.chance(30):
        arguments["bias"] = d.normal((vocabulary,), dtype)
    if d.chance(30):
        arguments |= {"softcap": 5.0, "logit_scale": 1.3}
    if (divisor := normalizers(d, num)) is not None:
        arguments["normalizer"] = divisor
    before = dict(arguments)
    nonsense = corrupt(d, arguments, ("log_z", "logp_ref", "logp_old", "logp_sampler", "groups", "mask",
                                     "cu_seqlens", "bias"))  # fmt: skip
    if not nonsense and any(arguments[k] is not v for k, v in before.items()):
        nonsense = None
    masks = dict.fromkeys(("logp_ref", "logp_old", "logp_sampler"), mask) | {"reward": used, "log_z": used}
    masks["hidden"] = mask[..., None].expand(*shape, hidden_size)
    leaves = ("hidden", "weight", "bias", "log_z")
    return compare_losses(d, linear_call, arguments, masks, leaves, nonsense, True, rel=2e-4)


def door_LogPartition(d):
    shape, place, mask, _ = tokens_of(d)
    width = d.of(1, 4)
    net = LogPartition(width, layers=d.of(1, 2, 3))
    with torch.no_grad():
        net.out.weight.normal_(generator=d.make)
    hidden = d.junk(d.normal((*shape, width), d.of(*FLOATS)), mask)
    arguments = {"hidden": hidden, **place}
    nonsense = corrupt(d, arguments, ("mask", "cu_seqlens"))
    got = attempt(lambda: net(**arguments), arguments)
    if outcome(got, nonsense) == "refused" or arguments["hidden"] is not hidden or len(arguments) < 2:
        return "refused" if got is None else "agreed"
    if any(arguments[k] is not v for k, v in place.items()):
        return "agreed"
    clean = torch.where(mask[..., None], hidden.detach().double(), 0.0)
    if "cu_seqlens" in place:
        edges = place["cu_seqlens"].tolist()
        parts = [(clean[a:b], mask[a:b]) for a, b in itertools.pairwise(edges)]
    else:
        parts = list(zip(clean, mask))
    rows = [x.sum(0) / max(1, int(m.sum())) for x, m in parts]
    if rows:
        x = torch.stack(rows)
        for module in net.body:
            linear = hasattr(module, "weight")
            x = x @ module.weight.double().T + module.bias.double() if linear else torch.nn.functional.gelu(x)
        want = (x @ net.out.weight.double().T + net.out.bias.double())[:, 0].detach()
        close("log_z", got.detach(), want, 1e-4, floor=1e-5)
    return "agreed"


DOORS = {
    "flowrl_loss": door_flowrl_loss,
    "FlowRLLoss": door_FlowRLLoss,
    "LinearFlowRLLoss": door_LinearFlowRLLoss,
    "residual_loss": door_residual_loss,
    "policy_gradient_loss": door_policy_gradient_loss,
    "rollout_correction": door_rollout_correction,
    "value_loss": door_value_loss,
    "LogPartition": door_LogPartition,
}
