"""Are FlowRL's large gradient norms the weight's or log Z's? Lengths 8 to 2048 on a synthetic policy.

`python -m benchmarks.evidence.gradient_norms` writes gradient_norms.json. Synthetic: a table of logits for each
position [T, 32], responses drawn from it, coin-flip rewards normalised in groups of 8, and a policy that has drifted
from the one that sampled by normal noise on its logits. No model and no learning: it says how the two factors scale.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from benchmarks.machine import describe
from flowrl_kernels import flowrl_loss, group_normalize

OUT = Path(__file__).parent / "gradient_norms.json"
LENGTHS = (8, 32, 128, 512, 2048)
DRIFTS = (0.01, 0.03, 0.1)  # deviation of a token's log-ratio, nats
WEIGHTS = {"none": None, "paper": (0.8, 1.2), "release": (None, 10.0), "unclipped": (None, None)}
BETA, PROMPTS, GROUP, BATCHES, VOCABULARY = 15.0, 8, 8, 24, 32


def measure(length: int, drift: float, seed: int) -> dict[str, list[float]]:
    """Of one batch: by weight and log Z, [norm of the policy's gradient, norm of log Z's, largest weight]."""
    draw = torch.Generator().manual_seed(seed)
    old = torch.randn(length, VOCABULARY, generator=draw, dtype=torch.float64).log_softmax(-1)
    noise = torch.randn(length, VOCABULARY, generator=draw, dtype=torch.float64)
    new = (old + drift * noise).log_softmax(-1)
    tokens = torch.multinomial(old.exp(), PROMPTS * GROUP, replacement=True, generator=draw).T  # [B, T]
    groups = torch.arange(PROMPTS).repeat_interleave(GROUP)
    right = torch.randint(2, (PROMPTS * GROUP,), generator=draw).double()
    right[::GROUP], right[1::GROUP] = 0.0, 1.0  # no group is all alike
    reward = group_normalize(right, groups)
    best = reward.reshape(PROMPTS, GROUP).amax(-1)
    at = torch.arange(length).expand_as(tokens)
    logp, logp_old = (table[at, tokens] for table in (new, old))
    made = {}
    for name, clip in WEIGHTS.items():
        for where, value in (("start", torch.zeros(PROMPTS, dtype=torch.float64)), ("optimum", BETA * best)):
            of_policy, log_z = logp.clone().requires_grad_(), value.clone().requires_grad_()
            weighing = {"ratio": None} if clip is None else {"clip": clip}
            out = flowrl_loss(of_policy, logp_old, reward, log_z[groups], logp_old=logp_old, beta=BETA, **weighing)
            of_tokens, of_log_z = torch.autograd.grad(out.loss, [of_policy, log_z])
            # through log-softmax into the table: a token's logit less the policy's mean of it
            gradient = torch.zeros_like(new).index_put_((at, tokens), of_tokens, accumulate=True)
            gradient -= of_tokens.sum(0)[:, None] * new.exp()
            made[f"{name}, log Z at its {where}"] = [
                float(gradient.norm()), float(of_log_z.norm()), float(out.weight.max())
            ]  # fmt: skip
    return made


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for length in LENGTHS:
        for drift in DRIFTS:
            batches = [measure(length, drift, seed) for seed in range(BATCHES)]
            for name in batches[0]:
                policy, log_z, weight = zip(*(batch[name] for batch in batches))
                rows.append(
                    {
                        "length": length, "drift": drift, "case": name,
                        "policy_median": _digits(sorted(policy)[BATCHES // 2]), "policy_max": _digits(max(policy)),
                        "log_z_median": _digits(sorted(log_z)[BATCHES // 2]), "log_z_max": _digits(max(log_z)),
                        "weight_max": _digits(max(weight)),
                    }
                )  # fmt: skip
    head = {"synthetic": True, "beta": BETA, "prompts": PROMPTS, "group": GROUP, "batches": BATCHES}
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = json.dumps({**head, "machine": describe("cpu")}, indent=1).removesuffix("\n}")
    OUT.write_text(text + f',\n "rows": [\n{lines}\n ]\n}}\n')


def _digits(value: float) -> float:
    return float(f"{value:.4g}") if math.isfinite(value) else value


if __name__ == "__main__":
    main()
