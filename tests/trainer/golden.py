"""One training step worked out a second time: float64, one sequence at a time, from the papers' formulas.

No loss, advantage, preset, packing or optimiser of the package is used here: transformers' own logits, autograd, and
AdamW by hand. What a response is and which settings there are comes in as plain data.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

RANGE = {"dapo": (0.8, 1.28), "cispo": (0.0, 1.28), "gspo": (1 - 3e-4, 1 + 4e-4)}  # the others: (0.8, 1.2)
PER_SEQUENCE = ("grpo", "gspo")  # a mean over each response, then over responses; dr_grpo divides by the budget
TARGET = ("zscore", "centred")


@dataclass
class Response:
    group: int
    prompt: list
    tokens: list
    sampler: torch.Tensor  # [n] log-probabilities that the engine gave
    reward: float | None
    old: torch.Tensor | None = None  # [n]
    ref: torch.Tensor | None = None  # [n]
    value: torch.Tensor | None = None  # [n] the critic's before the step
    took_part: bool = False
    target: float = 0.0  # of a flow: the shaped reward
    advantage: torch.Tensor | None = None  # [n]
    returns: torch.Tensor | None = None  # [n]
    log_z: float = 0.0  # the group's
    kept: list | None = None  # ids that each token was drawn from, where that was not everything
    weight: torch.Tensor | None = None  # [n] of the correction for the sampler
    stays: torch.Tensor | None = None  # [n] bool: not rejected


@dataclass
class Golden:
    loss: float
    gradient: torch.Tensor  # before clipping, all parameters in order
    norm: float
    lr: float
    parameters: torch.Tensor  # after the update


def read(policy, response, temperature):
    """logp [n], entropy [n], hidden of the prompt [p, H], hidden that predicts [n, H] of one sequence by itself."""
    ids = torch.tensor([response.prompt + response.tokens])
    out = policy.model(input_ids=ids, output_hidden_states=True, use_cache=False)
    start = len(response.prompt) - 1
    z = out.logits[0, start:-1] / temperature  # [n, V]
    if response.kept is not None:  # the others have no chance, under whichever policy
        out_of_reach = torch.ones_like(z, dtype=torch.bool)
        for row, ids in zip(out_of_reach, response.kept):
            row[ids] = False
        z = z.masked_fill(out_of_reach, -1e9)
    table = torch.log_softmax(z, -1)
    logp = table[range(len(response.tokens)), response.tokens]
    states = out.hidden_states[-1][0]
    return logp, -(table.exp() * table).sum(-1), states[: start + 1], states[start:-1]


def log_z_of(policy, prompt_states):
    x, net = prompt_states.mean(0), policy.log_z
    for layer in (net.body[0], net.body[2]):
        x = F.gelu(x @ layer.weight.T + layer.bias)
    return (x @ net.out.weight.T + net.out.bias)[0]


def value_of(policy, states):
    first = policy.value.body[0]
    x = F.gelu(states.detach() @ first.weight.T + first.bias)
    return (x @ policy.value.out.weight.T + policy.value.out.bias)[:, 0]


# ------------------------------------------------------------------------------------------------ before the updates


def shape(responses, a, budget):
    """Shaped rewards; returns the responses that take part."""
    live = [r for r in responses if r.reward is not None]
    reward = {}
    for r in live:
        reward[id(r)] = r.reward
        if a["overlong_buffer"]:  # DAPO, eq. 13: falls linearly over the last tokens of the budget
            over = (len(r.tokens) - (budget - a["overlong_buffer"])) / a["overlong_buffer"]
            reward[id(r)] -= a["overlong_penalty"] * min(1.0, max(0.0, over))
    members = {r.group: [m for m in live if m.group == r.group] for r in live}
    if a["unlikeliness"]:  # arXiv 2506.02355: the least likely of its group keeps all of its reward
        paid = dict(reward)
        for group in members.values():
            by_likelihood = sorted(group, key=lambda r: float(r.sampler.mean()))
            for rank, r in enumerate(by_likelihood):
                paid[id(r)] = reward[id(r)] * (1 - a["unlikeliness"] * rank / len(group))
        reward = paid
    out = []
    for r in live:
        own = torch.tensor([reward[id(m)] for m in members[r.group]], dtype=torch.float64)
        x = reward[id(r)]
        how = a["shape"]
        if how in TARGET:
            x = x - float(own.mean()) if len(own) > 1 else 0.0
        if how == "zscore":
            x = x / (float(own.std()) + 1e-6)
        if how == "left out":  # arXiv 2402.14740, eq. 8: against the mean of the group's others
            others = [reward[id(m)] for m in members[r.group] if m is not r]
            x = x - sum(others) / len(others) if others else 0.0
        if how == "by length":  # arXiv 2505.23585, eq. 5: against the mean weighted by length
            lengths = [len(m.tokens) for m in members[r.group]]
            weighted = sum(n * reward[id(m)] for n, m in zip(lengths, members[r.group]))
            x = x - weighted / sum(lengths) if len(lengths) > 1 else 0.0
        if a["name"] == "raft" and x <= 0:
            continue  # only good samples are trained
        if a["filter"] and float(own.max() - own.min()) < 1e-9:
            continue
        r.target, r.took_part = x, True
        r.advantage = torch.full_like(r.old, x)
        out.append(r)
    return out


def per_token(responses, a):
    """Generalised advantage estimates (arXiv 1506.02438) over the whole step, whitened; without a critic: returns."""
    for r in responses:
        value = torch.zeros_like(r.old) if r.value is None else r.value
        paid = torch.zeros_like(r.old)
        paid[-1] = r.target
        if a["name"] == "reinforce_pp" and a["kl"]:
            paid = paid - a["kl"] * (r.old - r.ref)
        lam = a["gae_lambda"] if a["name"] == "ppo" else 1.0
        advantage = torch.zeros_like(paid)
        for t in range(len(paid)):
            for k in range(t, len(paid)):
                after = value[k + 1] if k + 1 < len(paid) else 0.0
                advantage[t] += (a["gamma"] * lam) ** (k - t) * (paid[k] + a["gamma"] * after - value[k])
        r.advantage, r.returns = advantage, advantage + value
    every = torch.cat([r.advantage for r in responses])
    for r in responses:
        r.advantage = (r.advantage - every.mean()) / (every.var() + 1e-8).sqrt()


def correct(responses, a):
    """Weights and rejections for the sampler: verl's rollout_corr_helper.py; tis_cap: of whole responses."""
    for r in responses:
        gap = r.old - r.sampler
        r.weight, r.stays = torch.ones_like(gap), torch.ones_like(gap, dtype=torch.bool)
        if a["tis_cap"]:
            r.weight = r.weight * min(math.exp(float(gap.sum())), a["tis_cap"])
        elif a["correction"] == "token_truncate+token_k1":
            high, low = 1.02, 0.85
            r.weight = gap.exp().clamp(max=high)
            r.stays = (-gap >= math.log(low)) & (-gap <= math.log(1 / low))
        elif a["correction"] == "sequence_mask":
            ratio = math.exp(float(gap.sum()))
            r.weight = r.weight * (ratio if 0.9 <= ratio <= 1.3 else 0.0)
        elif a["correction"]:
            raise ValueError(a["correction"])


def group_log_z(responses, beta):
    """VarGrad: log Z is the group's mean of what the rest of the residual is short of."""
    short = {id(r): beta * r.target + float((r.ref - r.old).mean()) for r in responses}
    for r in responses:
        own = [short[id(m)] for m in responses if m.group == r.group]
        r.log_z = sum(own) / len(own)


# ------------------------------------------------------------------------------------------------ the losses


def flow(policy, batch, a, temperature):
    """arXiv 2509.15207, eq. 6; or trajectory balance (arXiv 2201.13259): sums in place of means, no weight."""
    total = 0.0
    for r in batch:
        logp, _, prompt, _ = read(policy, r, temperature)
        log_z = {"learned": lambda p=prompt: log_z_of(policy, p), "group": lambda r=r: r.log_z, "none": lambda: 0.0}
        length = len(r.tokens) if a["preset"] == "paper" else 1
        delta = log_z[a["log_z"]]() + (logp.sum() - r.ref.sum()) / length - a["beta"] * r.target
        weight = 1.0
        if a["preset"] == "paper":
            low, high = a["clip"] or (0.8, 1.2)
            weight = min(max(math.exp(float((logp.detach() - r.old).sum())), low), high)
        weight *= float(r.weight.mean())
        total = total + weight * penalty(delta, a["alpha"])
    return total / len(batch)


def penalty(delta, alpha):
    """The square; or L_alpha (docs/maths.md, eq. 21)."""
    if alpha is None:
        return delta**2
    k = alpha - 1.0
    return ((k * delta).exp() - k * delta - 1.0) / k**2


def clipped(ratio, advantage, low, high):
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def gradient(policy, batch, a, temperature, budget):
    """PPO (arXiv 1707.06347) and the rows that differ from it: minus the objective, so that it is minimised."""
    name = a["name"]
    low, high = a["clip"] or RANGE.get(name, (0.8, 1.2))
    tokens = sum(int(r.stays.sum()) for r in batch)
    total = 0.0
    for r in batch:
        logp, entropy, _, states = read(policy, r, temperature)
        old = logp.detach() if not a["old"] else r.old
        ratio = (logp - old).exp()
        if name == "gspo":  # arXiv 2507.18071: one ratio per response, the geometric mean
            loss = clipped((logp - old).mean().exp(), r.advantage, low, high)
        elif name == "cispo":  # arXiv 2506.13585: the clipped weight is a constant
            loss = -ratio.detach().clamp(low, high) * r.advantage * logp
        elif name in ("raft", "rloo", "opo"):  # arXiv 2304.06767: likelihood of the good ones; 2402.14740: REINFORCE
            loss = -r.advantage * logp
        else:
            loss = clipped(ratio, r.advantage, low, high)
        if a["dual_clip"]:
            loss = torch.where(r.advantage < 0, torch.minimum(loss, -a["dual_clip"] * r.advantage), loss)
        loss = loss * r.weight
        if a["kl"] and name != "reinforce_pp":  # k3, joschu.net/blog/kl-approx.html
            loss = loss + a["kl"] * ((r.ref - logp).exp() - (r.ref - logp) - 1)
        loss, entropy = loss * r.stays, entropy * r.stays
        if name in PER_SEQUENCE:
            total = total + loss.mean() / len(batch)
        elif name in ("rloo", "opo"):  # the log-probability of the whole response
            total = total + loss.sum() / len(batch)
        elif name == "dr_grpo":  # arXiv 2503.20783: a constant in place of the length
            total = total + loss.sum() / budget / len(batch)
        else:
            total = total + loss.sum() / tokens
        if a["entropy"]:
            total = total - a["entropy"] * entropy.sum() / tokens
        if name == "ppo":
            value, move = value_of(policy, states), a["value_clip"]
            near = r.value + (value - r.value).clamp(-move, move)
            worse = torch.maximum((value - r.returns) ** 2, (near - r.returns) ** 2)
            total = total + 0.5 * (worse * r.stays).sum() / tokens
    return total


# ------------------------------------------------------------------------------------------------ the step


def rate(o, update, total):
    """Share of the learning rate: linear warm-up, then the schedule."""
    rise = min(1.0, (update + 1) / (o["warmup"] + 1))
    done = max(0, update - o["warmup"]) / max(1, total - o["warmup"])
    fall = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": (1.0 + math.cos(math.pi * done)) / 2,
        "wsd": min(1.0, (1.0 - done) / 0.2),
    }
    return rise * fall[o["schedule"]]


def step(policy, reference, responses, a, o, *, temperature, budget, groups_per_update, epochs, rates):
    """All updates of one step, policy changed in place: one `Golden` each.

    Args:
        policy: float64, with `model`, `log_z` and `value`; reference: the same at the frozen start.
        a, o: the algorithm's and the optimiser's settings. rates: (parameters, learning rate) per optimiser group.
    """
    with torch.no_grad():
        for r in responses:
            r.old, _, _, states = read(policy, r, temperature)
            r.ref = read(reference, r, temperature)[0]
            r.value = value_of(policy, states) if a["name"] == "ppo" else None
    live = shape(responses, a, budget)
    correct(live, a)
    if a["name"] in ("ppo", "reinforce_pp", "reinforce_pp_baseline"):
        per_token(live, a)
    if a["log_z"] == "group":
        group_log_z(live, a["beta"])
    groups = max(r.group for r in responses) + 1
    parts = [range(g, g + groups_per_update) for g in range(0, groups, groups_per_update)]
    batches = [[r for r in live if r.group in part] for part in parts] * epochs
    every = [(p, lr) for parameters, lr in rates for p in parameters]
    first = [torch.zeros_like(p) for p, _ in every]
    second = [torch.zeros_like(p) for p, _ in every]
    out = []
    for number, batch in enumerate(batches):
        if a["name"] == "flowrl":
            loss = flow(policy, batch, a, temperature)
        else:
            loss = gradient(policy, batch, a, temperature, budget)
        found = torch.autograd.grad(loss, [p for p, _ in every], allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, (p, _) in zip(found, every)]
        flat = torch.cat([g.flatten() for g in grads])
        norm, share = float(flat.norm()), rate(o, number, len(batches))
        shrink = min(1.0, o["max_grad_norm"] / norm)
        with torch.no_grad():  # AdamW (arXiv 1711.05101)
            b1, b2 = o["betas"]
            for (p, lr), g, m, v in zip(every, grads, first, second):
                g = g * shrink
                m.mul_(b1).add_(g, alpha=1 - b1)
                v.mul_(b2).add_(g * g, alpha=1 - b2)
                mean, square = m / (1 - b1 ** (number + 1)), v / (1 - b2 ** (number + 1))
                p.mul_(1 - lr * share * o["weight_decay"]).sub_(lr * share * mean / (square.sqrt() + 1e-8))
        after = torch.cat([p.detach().flatten() for p, _ in every])
        out.append(Golden(float(loss.detach()), flat, norm, rates[0][1] * share, after))
    return out
