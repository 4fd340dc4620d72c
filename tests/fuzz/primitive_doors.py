"""The doors of the log-prob primitives, against the reference in float64; see doors.py."""

import math

import torch

from flowrl_kernels import linear_logprob, logprob, reference

from .draws import BUDGET, FLOATS, IDS, attempt, close, corrupt, finite, outcome


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


DOORS = {"linear_logprob": door_linear_logprob, "logprob": door_logprob}
