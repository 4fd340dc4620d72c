"""The doors of the advantages, against plain loops in Python floats; see doors.py."""

import itertools
import math

import torch

from flowrl_kernels import advantages

from .doors import BUDGET, corrupt, outcome, tokens_of
from .draws import FLOATS, IDS, attempt, close


def groups_of(d):
    num = d.of(0, 1, 2, 5, 9)
    dtype = d.of(*FLOATS)
    reward = d.spice(d.normal((num,), dtype), options=(math.nan, math.inf, 3e4))
    return num, reward, d.ids((num,), d.of(1, 3, 9), d.of(*IDS))


def by_group(reward, groups, one):
    """one(list of the group's rewards, position) at every place, in Python floats."""
    values, ids = reward.double().tolist(), groups.long().tolist()
    out = []
    for i, g in enumerate(ids):
        members = [j for j, other in enumerate(ids) if other == g]
        out.append(one([values[j] for j in members], members.index(i)))
    return torch.tensor(out, dtype=torch.float64)


def zscore(own, at, scale=True):
    if len(own) < 2:
        return 0.0
    mean = math.fsum(own) / len(own)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in own) / (len(own) - 1))
    return (own[at] - mean) / (deviation + 1e-6) if scale else own[at] - mean


def loo(own, at):
    return own[at] - math.fsum(own[:at] + own[at + 1 :]) / (len(own) - 1) if len(own) > 1 else 0.0


PER_GROUP = {
    "group_normalize": zscore,
    "leave_one_out": loo,
    "reinforce_rej": lambda own, at: own[at] if max(own) - min(own) > 1e-9 else 0.0,
}


def grouped(name):
    def door(d):
        _, reward, groups = groups_of(d)
        arguments = {"reward": reward, "groups": groups}
        nonsense = corrupt(d, arguments)
        got = attempt(lambda: getattr(advantages, name)(**arguments), arguments)
        if (
            outcome(got, nonsense) == "refused"
            or arguments["reward"] is not reward
            or arguments["groups"] is not groups
        ):
            return "refused" if got is None else "agreed"
        ids = groups.long()
        bad = torch.tensor([bool((~reward[ids == g].isfinite()).any()) for g in ids], dtype=torch.bool)
        want = by_group(torch.where(bad, torch.zeros_like(reward), reward), groups, PER_GROUP[name])
        if (~bad).any():
            close(name, got[~bad], want[~bad], BUDGET[got.dtype], floor=1e-5)
        return "agreed"

    return door


def door_unlikeliness_reward(d):
    num, reward, groups = groups_of(d)
    logp = d.normal((num,), d.of(*FLOATS))
    arguments = {"reward": reward, "logp_old_mean": logp, "groups": groups, "strength": d.of(0.25, 0.0, 1.0)}
    before = dict(arguments)
    nonsense = corrupt(d, arguments)
    got = attempt(lambda: advantages.unlikeliness_reward(**arguments), arguments)
    if outcome(got, nonsense) == "refused" or any(arguments[k] is not v for k, v in before.items()):
        return "refused" if got is None else "agreed"
    values, ids, likely = reward.double().tolist(), groups.long().tolist(), logp.double().tolist()
    want = []
    for i in range(num):
        own = [j for j in range(num) if ids[j] == ids[i]]
        rank = sum((likely[i], i) > (likely[j], j) for j in own)
        want.append(values[i] * (1 - arguments["strength"] * rank / len(own)))
    good = reward.isfinite()
    if good.any():
        close("unlikeliness", got[good], torch.tensor(want, dtype=torch.float64)[good], BUDGET[got.dtype])
    return "agreed"


def door_whiten(d):
    shape, _, mask, _ = tokens_of(d)
    value = d.junk(d.normal(shape, d.of(*FLOATS)), mask)
    arguments = {"value": value, "mask": mask}
    nonsense = corrupt(d, arguments)
    got = attempt(lambda: advantages.whiten(**arguments), arguments)
    if outcome(got, nonsense) == "refused" or arguments["value"] is not value or arguments["mask"] is not mask:
        return "refused" if got is None else "agreed"
    x = value.double()[mask]
    want = torch.zeros(shape, dtype=torch.float64)
    if len(x):
        variance = float(x.var()) if len(x) > 1 else 0.0
        want[mask] = (x - x.mean()) / math.sqrt(variance + 1e-8)
    close("whiten", got, want, BUDGET[got.dtype], floor=1e-3 if float(want.abs().sum()) == 0 else 1e-5)
    return "agreed"


def token_advantages(d, name):
    shape, place, mask, used = tokens_of(d)
    place = {"mask": mask, **{k: v for k, v in place.items() if k == "cu_seqlens"}}
    dtype, num = d.of(*FLOATS), len(used)
    arguments = {"reward": d.junk(d.normal((num,), dtype), used), **place, "gamma": d.of(1.0, 0.9, 0.0)}
    if name == "gae":
        arguments |= {"value": d.junk(d.normal(shape, dtype), mask), "lam": d.of(1.0, 0.8, 0.0)}
    if d.chance(50):
        arguments["token_reward"] = d.junk(d.normal(shape, d.of(*FLOATS)), mask)
    before = dict(arguments)
    nonsense = corrupt(d, arguments, ("token_reward", "cu_seqlens"))
    got = attempt(lambda: getattr(advantages, name)(**arguments), arguments)
    if outcome(got, nonsense) == "refused" or any(arguments[k] is not v for k, v in before.items()):
        return "refused" if got is None else "agreed"
    if "cu_seqlens" in place:
        edges = place["cu_seqlens"].tolist()
        parts = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
        flat = mask
    else:
        width = shape[1]
        parts = [list(range(b * width, (b + 1) * width)) for b in range(num)]
        flat = mask.reshape(-1)

    def numbers(key):
        t = arguments.get(key)
        return [0.0] * len(flat) if t is None else t.double().reshape(-1).tolist()

    value, paid, lam = numbers("value"), numbers("token_reward"), arguments.get("lam", 1.0)
    want, returns = [0.0] * len(flat), [0.0] * len(flat)
    for b, part in enumerate(parts):
        own = [i for i in part if flat[i]]
        running = following = 0.0
        for k, i in enumerate(reversed(own)):
            r = paid[i] + (float(arguments["reward"][b]) if k == 0 else 0.0)
            running = r + arguments["gamma"] * following - value[i] + arguments["gamma"] * lam * running
            following = value[i]
            want[i], returns[i] = running, running + value[i]
    want, returns = (torch.tensor(x, dtype=torch.float64).reshape(mask.shape) for x in (want, returns))
    if name == "gae":
        close("advantage", got[0], want, BUDGET[got[0].dtype], floor=1e-5)
        close("returns", got[1], returns, BUDGET[got[1].dtype], floor=1e-5)
        return "agreed"
    x = want[mask]
    if len(x) > 1 and float(x.var()) > 1e-6:
        white = torch.zeros_like(want)
        white[mask] = (x - x.mean()) / (x.var() + 1e-8).sqrt()
        close("advantage", got, white, BUDGET[got.dtype], floor=1e-5)
    return "agreed"


DOORS = {
    "unlikeliness_reward": door_unlikeliness_reward,
    "whiten": door_whiten,
    "gae": lambda d: token_advantages(d, "gae"),
    "reinforce_pp_advantage": lambda d: token_advantages(d, "reinforce_pp_advantage"),
    **{name: grouped(name) for name in PER_GROUP},
}
