"""Dynamic sampling: other prompts in the place of groups that are all right or all wrong (DAPO, arXiv 2503.14476).

Such a group has no advantage to learn from. Here a step keeps its number of groups: each poor one is asked anew with
another prompt, at most `rollout.dynamic` times, and stays where no round found better. Its price, and what the policy
scored before anything was replaced, are logged.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.records import Rollouts, Run
from flowrl_kernels.trainer.rollout import Kept
from flowrl_kernels.trainer.rollout.hf import joined

Sample = Callable[[list[int], int], Rollouts]
"""(slots of a step, number of the round) -> responses to that round's prompts for these slots, scored."""


def refill(run: Run, rollouts: Rollouts, sample: Sample) -> tuple[Rollouts, dict[str, float]]:
    """The step's groups with poor ones replaced where a round found better, and what the log says of it.

    Every rank calls it, and calls `sample` as often as the others: with none of its own slots left, for one slot whose
    responses are thrown away.
    """
    n, most = run.config.rollout.samples, run.config.rollout.dynamic
    device = run.world.device
    first = [reward for reward in rollouts.reward if reward is not None]
    judged = [reward for reward in judging(rollouts) if reward is not None]
    counts = [sum(first), len(first), sum(map(run.task.correct, judged)), len(judged)]
    sampled = kept = sum(map(len, rollouts.responses))
    asked = rounds = 0
    while rounds < most:
        poor = [g for g in range(len(rollouts.problems) // n) if not mixed(judging(rollouts)[g * n : (g + 1) * n])]
        if not int(parallel.total(torch.tensor([len(poor)], device=device), run.world)):
            break
        rounds += 1
        slots = [rollouts.numbers[g * n] // n for g in poor]
        other = sample(slots or [rollouts.numbers[0] // n], rounds)
        sampled += sum(map(len, other.responses))
        asked += len(slots)
        better = [k for k in range(len(slots)) if mixed(judging(other)[k * n : (k + 1) * n])]
        size = len(rollouts.problems)
        which = list(range(size))
        for k in better:
            which[poor[k] * n : (poor[k] + 1) * n] = range(size + k * n, size + (k + 1) * n)
        rollouts = taken(rollouts, other, which)
        kept = sum(map(len, rollouts.responses))
    left = sum(not mixed(judging(rollouts)[i : i + n]) for i in range(0, len(rollouts.problems), n))
    sums = torch.tensor([*counts, sampled, kept, asked, left], dtype=torch.float64, device=device)
    reward, scored, right, known, sampled, kept, asked, left = parallel.total(sums, run.world).tolist()
    return rollouts, {
        "extra_rounds": float(rounds),
        "extra_prompts": asked,
        "thrown_away": 1.0 - kept / sampled,
        "groups_poor": left / run.config.rollout.prompts,
        "reward_asked": reward / scored if scored else float("nan"),
        "accuracy_asked": right / known if known else float("nan"),
    }


def judging(rollouts: Rollouts) -> list[float | None]:
    """The rewards that say what is right: of several the first."""
    return next(iter(rollouts.parts.values()), rollouts.reward)


def mixed(group: list[float | None]) -> bool:
    return len({reward for reward in group if reward is not None}) > 1


def taken(a: Rollouts, b: Rollouts, which: list[int]) -> Rollouts:
    """Sequences `which` of a and b one behind the other, as responses to the prompts that a numbers."""
    width = max(a.logp.shape[1], b.logp.shape[1])
    logp = torch.cat([torch.nn.functional.pad(r.logp, (0, width - r.logp.shape[1])) for r in (a, b)])
    kept: Kept | None = None
    if a.kept is not None and b.kept is not None:
        both = joined([a.kept, b.kept])
        assert both is not None
        length = torch.tensor([len(response) for r in (a, b) for response in r.responses])
        start = length.cumsum(0) - length
        kept = both.rows(torch.cat([torch.arange(int(length[i])) + start[i] for i in which]))
    rows = torch.tensor(which)
    return Rollouts(
        problems=[[*a.problems, *b.problems][i] for i in which],
        numbers=a.numbers,
        prompts=[[*a.prompts, *b.prompts][i] for i in which],
        responses=[[*a.responses, *b.responses][i] for i in which],
        logp=logp[rows],
        finished=torch.cat([a.finished, b.finished])[rows],
        texts=[[*a.texts, *b.texts][i] for i in which],
        kept=kept,
        reward=[[*a.reward, *b.reward][i] for i in which],
        parts={name: [[*part, *b.parts[name]][i] for i in which] for name, part in a.parts.items()},
    )
