"""One door a function: draws a call, and either it agrees with float64 or it is refused by name.

Each returns "agreed" or "refused"; anything else is an error of the library.
"""

import itertools
import math

import torch

from flowrl_kernels import (
    FlowRLLoss,
    LinearFlowRLLoss,
    LogPartition,
    flowrl_loss,
    linear_logprob,
    logprob,
    policy_gradient_loss,
    reference,
    residual_loss,
    value_loss,
)
from flowrl_kernels.presets import PRESETS

from .draws import FLOATS, IDS, attempt, close, finite

BUDGET = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OUT = {torch.float64: 1e-9, torch.float32: 2e-5}


def corrupt(d, arguments, optional=()):
    """Now and then one argument is something else altogether; True where that cannot be meant."""
    d.told = arguments
    if not d.chance(25):
        return False
    name = d.of(*arguments)
    value = arguments[name]
    wrong = d.wrong() if isinstance(value, torch.Tensor) else d.odd_number()
    arguments[name] = wrong
    if not isinstance(value, torch.Tensor):
        return isinstance(wrong, str | list | dict)
    if wrong is None:
        return name not in optional
    if name in ("normalizer", "temperature"):  # numbers as well as tensors
        return isinstance(wrong, str | list | dict | torch.nn.Module)
    return not isinstance(wrong, torch.Tensor)


def outcome(out, nonsense):
    if out is None:
        return "refused"
    assert not nonsense, "took what cannot be meant"
    return "agreed"


# ------------------------------------------------------------------------------------------------ primitives


def head_of(d, leading, vocabulary, dtype, like):
    settings = {"ignore_index": d.of(-100, 0, vocabulary - 1, 255)}
    if d.chance(30):
        settings["softcap"] = d.of(1.5, 30.0, 1e-3)
    if d.chance(30):
        settings["temperature"] = d.of(0.7, 2.0, 1e-2, (torch.rand(leading, generator=d.make) + 0.2))
    settings["entropy"] = d.chance(50)
    target = d.ids(leading, vocabulary, d.of(*IDS))
    if d.chance(40):
        ignored = torch.rand(leading, generator=d.make) < 0.5
        target = torch.where(ignored, torch.tensor(settings["ignore_index"]).to(target.dtype), target)
    counts = target.long() != settings["ignore_index"]
    return settings, target, counts


def of_rows(settings, counts):
    """The settings for the rows that count alone."""
    out = {k: v for k, v in settings.items() if k in ("softcap", "temperature", "logit_scale", "entropy")}
    if isinstance(out.get("temperature"), torch.Tensor):
        out["temperature"] = out["temperature"][counts].double()
    return out


def compare_rows(out, grads, want, wanted_grads, counts, good, dtype, entropy, exact):
    size = 1.0 + float(want.logp.detach()[good].abs().max()) if good.any() else 1.0
    rel = BUDGET[torch.float64 if dtype == torch.float64 else torch.float32]
    close("logp", out.logp[counts][good], want.logp.detach()[good], rel, floor=rel * size * 0.1)
    assert (out.logp[~counts] == 0).all(), "logp: not 0 at ignored rows"
    if entropy:
        close("entropy", out.entropy[counts][good], want.entropy.detach()[good], rel, floor=rel * 2)
        assert (out.entropy[~counts] == 0).all()
    if grads is None or not good.all():
        return
    for name, got, wanted in zip(("dhidden", "dweight", "dbias"), grads, wanted_grads):
        assert not got.isnan().any(), f"{name}: NaN from finite input"
        if exact and got.numel():
            close(name, got, wanted, BUDGET[dtype], floor=1e-5)


def door_linear_logprob(d):
    leading = d.of((), (1,), (0,), (5,), (2, 3), (3, 0), (9,))
    hidden_size, vocabulary, dtype = d.of(1, 2, 7), d.of(1, 2, 9, 130), d.of(*FLOATS)
    settings, target, counts = head_of(d, leading, vocabulary, dtype, None)
    hidden = d.spice(d.junk(d.normal((*leading, hidden_size), dtype), counts), options=(math.nan, math.inf))
    weight, bias = d.normal((vocabulary, hidden_size), dtype), d.normal((vocabulary,), dtype) if d.chance(50) else None
    weight = d.spice(weight, percent=5, options=(math.nan,))
    settings["logit_scale"] = d.of(1.0, 0.5, -1.0)
    settings["impl"] = d.of("auto", "chunked", "reference")
    if settings["impl"] != "reference" and d.chance(20):
        settings["epsilon"] = d.of(0.01, 0.5)
    arguments = {"hidden": hidden, "weight": weight, "target": target, "bias": bias, **settings}
    nonsense = corrupt(d, arguments, ("bias",))
    changed = any(arguments[k] is not v for k, v in {"hidden": hidden, "weight": weight, "target": target}.items())
    leaves = [t for t in (hidden, weight, bias) if t is not None]

    def call():
        given = dict(arguments)
        fresh = {}
        for name in ("hidden", "weight", "bias"):
            t = given[name]
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                fresh[name] = given[name] = t.detach().requires_grad_()
        out = linear_logprob(given.pop("hidden"), given.pop("weight"), given.pop("target"), **given)
        grads = None
        if out.logp.requires_grad and len(fresh) == len(leaves):
            total = out.logp.sum() if out.entropy is None else out.logp.sum() + 0.5 * out.entropy.sum()
            grads = torch.autograd.grad(total, list(fresh.values()))
        return out, grads

    got = attempt(call, arguments)
    if outcome(got, nonsense) == "refused":
        return "refused"
    if changed or any(arguments[k] is not v for k, v in settings.items()) or arguments["bias"] is not bias:
        return "agreed"  # an odd setting that was taken: that it ended well is all we ask
    out, grads = got
    x = hidden.detach()[counts].double().reshape(-1, hidden_size).requires_grad_()
    w, b = weight.detach().double().requires_grad_(), None if bias is None else bias.detach().double().requires_grad_()
    want = reference.linear_logprob(x, w, target.long()[counts].reshape(-1), b, **of_rows(settings, counts))
    if not finite(weight, bias):
        return "agreed"
    good = x.detach().isfinite().all(-1)
    wanted = None
    if grads is not None and len(x):
        total = want.logp.sum() if want.entropy is None else want.logp.sum() + 0.5 * want.entropy.sum()
        dx, *rest = torch.autograd.grad(total, [t for t in (x, w, b) if t is not None])
        whole = torch.zeros(hidden.shape, dtype=torch.float64)
        whole[counts] = dx
        wanted = [whole, *rest]
    exact = settings.get("epsilon", 0.0) == 0.0
    compare_rows(
        out, grads if wanted else None, want, wanted, counts, good, dtype, settings["entropy"] is True, exact
    )  # fmt: skip
    return "agreed"


def door_logprob(d):
    leading, vocabulary, dtype = d.of((), (1,), (0,), (5,), (2, 3)), d.of(1, 2, 9, 130), d.of(*FLOATS)
    settings, target, counts = head_of(d, leading, vocabulary, dtype, None)
    logits = d.spice(d.junk(d.normal((*leading, vocabulary), dtype, 3.0), counts), options=(math.nan, -math.inf))
    settings["impl"] = d.of("auto", "chunked", "reference")
    arguments = {"logits": logits, "target": target, **settings}
    nonsense = corrupt(d, arguments)

    def call():
        given = dict(arguments)
        z = given.pop("logits")
        if isinstance(z, torch.Tensor) and z.is_floating_point():
            z = z.detach().requires_grad_()
        out = logprob(z, given.pop("target"), **given)
        return out, torch.autograd.grad(out.logp.sum(), z) if out.logp.requires_grad else None

    got = attempt(call, arguments)
    if outcome(got, nonsense) == "refused":
        return "refused"
    if any(arguments[k] is not v for k, v in {"logits": logits, "target": target, **settings}.items()):
        return "agreed"
    out, grads = got
    z = logits.detach()[counts].double().reshape(-1, vocabulary).requires_grad_()
    want = reference.logprob(z, target.long()[counts].reshape(-1), **of_rows(settings, counts))
    good = z.detach().isfinite().all(-1)
    wanted = None
    if len(z):
        whole = torch.zeros(logits.shape, dtype=torch.float64)
        whole[counts] = torch.autograd.grad(want.logp.sum(), z)[0]
        wanted = [whole]
    compare_rows(out, grads if wanted else None, want, wanted, counts, good, dtype, settings["entropy"] is True, True)
    return "agreed"


# ------------------------------------------------------------------------------------------------ losses


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
        return {"preset": name}, PRESETS[name].anchor, PRESETS[name].log_z
    out = {}
    options = {
        "beta": (15.0, 1.0, 0.0, -2.0), "ratio": ("sum", "mean", None), "anchor": ("ref", "old", None),
        "clip": ("paper", "release", (0.8, 1.2), (None, None), (0.0, 1.0), (None, 2), [0.5, None]),
        "phi": ("square", "exp", "exp_half", "cosh", "abs"), "tis": ("token", "mean", "sequence", None),
        "tis_cap": (2.0, 1.0), "length_normalize": (True, False),
    }  # fmt: skip
    for name, values in options.items():
        if d.chance(30):
            out[name] = d.of(*values)
    return out, out.get("anchor", "ref"), "learned"


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

    got = attempt(lambda: call(arguments), [*arguments, "log_z", "groups", "logp_ref", "logp_old", "logp_sampler",
                                            "normalizer", "horizon", "old_value", "anchor"])  # fmt: skip
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
    if not finite(*counted):
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
    for name, mine, theirs in zip(names, grads, wanted):
        if theirs is None:
            assert mine is None or (mine == 0).all(), f"d{name}: a gradient where there is none"
            continue
        if mine is None:
            assert (theirs == 0).all(), f"d{name}: no gradient where there is one"
            continue
        assert not mine.isnan().any(), f"d{name}: NaN from finite input"
        if masks.get(name) is not None:
            assert (mine[~masks[name]] == 0).all(), f"d{name}: gradient where nothing counts"
        budget = max(rel, BUDGET[mine.dtype] if mine.dtype.itemsize == 2 else OUT[mine.dtype])
        # a head whose rows are all alike has a gradient of 0, made of terms that are not
        close(f"d{name}", mine, theirs, budget, floor=1e-4 if name == "hidden" else 1e-6)
    return "agreed"


def token_values(d, shape, mask, dtype=None, near=None):
    dtype = dtype or d.of(*FLOATS)
    value = d.normal(shape, dtype, 0.5, -1.5)
    if near is not None:
        value = (near.double() + d.normal(shape, torch.float64, 0.2)).to(dtype)
    return d.spice(d.junk(value, mask), percent=10)


def door_flowrl_loss(d, function=flowrl_loss):
    shape, place, mask, used = tokens_of(d)
    settings, anchor, log_z = flow_settings(d)
    num = len(used)
    logp = token_values(d, shape, mask)
    arguments = {
        "logp": logp, "logp_ref": token_values(d, shape, mask, near=logp) if anchor == "ref" else None,
        "reward": d.spice(d.junk(d.normal((num,), d.of(*FLOATS)), used), percent=10), **place, **settings,
    }  # fmt: skip
    if log_z == "learned":
        arguments["log_z"] = d.of(d.junk(d.normal((num,), d.of(*FLOATS)), used), None, "group", "through")
    if d.chance(70):
        arguments["logp_old"] = token_values(d, shape, mask, near=logp)
    if d.chance(40):
        arguments["logp_sampler"] = token_values(d, shape, mask, near=logp)
    if d.chance(60):
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
        "phi": lambda: d.of("square", "exp", "abs"), "level": lambda: d.of("sequence", "token"),
        "normalizer": lambda: normalizers(d, num), "preset": lambda: d.of(*sorted(PRESETS)),
    }  # fmt: skip
    for name, made in options.items():
        if d.chance(30):
            arguments[name] = made()
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
    settings, anchor, log_z = flow_settings(d)
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
    if d.chance(60):
        arguments["logp_old"] = token_values(d, shape, mask, torch.float32, near=like)
    if d.chance(60):
        arguments["groups"] = d.ids((num,), 3)
    if d.chance(30):
        arguments["bias"] = d.normal((vocabulary,), dtype)
    if d.chance(30):
        arguments |= {"softcap": 5.0, "logit_scale": 1.3}
    if (divisor := normalizers(d, num)) is not None:
        arguments["normalizer"] = divisor
    before = dict(arguments)
    nonsense = corrupt(d, arguments, ("log_z", "logp_ref", "logp_old", "groups", "mask", "cu_seqlens", "bias"))
    if not nonsense and any(arguments[k] is not v for k, v in before.items()):
        nonsense = None
    masks = dict.fromkeys(("logp_ref", "logp_old"), mask) | {"reward": used, "log_z": used}
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
    "linear_logprob": door_linear_logprob,
    "logprob": door_logprob,
    "flowrl_loss": door_flowrl_loss,
    "FlowRLLoss": door_FlowRLLoss,
    "LinearFlowRLLoss": door_LinearFlowRLLoss,
    "residual_loss": door_residual_loss,
    "policy_gradient_loss": door_policy_gradient_loss,
    "value_loss": door_value_loss,
    "LogPartition": door_LogPartition,
}
