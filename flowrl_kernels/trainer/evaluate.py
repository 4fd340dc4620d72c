"""How often, how many ways, how close to the target: from samples, and exactly where a task can be listed."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.trainer.config import EvalConfig
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.tasks.base import Problem, Task


class Response(NamedTuple):
    """One sampled response: its text without EOS, its length in tokens with EOS, and whether EOS came."""

    text: str
    tokens: int
    finished: bool


Sample = Callable[[Sequence[Problem], int, int, int], list[list[Response]]]
"""(problems, n, seed, number of the first problem) -> n responses per problem; the same on every rank."""

LogProbs = Callable[[list[Problem], list[str]], Tensor]
"""(problems, texts) -> [B] float64: log-probability of each text and its EOS at the sampling temperature."""


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one; unbiased for k independent
    draws.

    Chen et al. 2021 (arXiv:2107.03374), equation 1. Raises ValueError unless 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= right <= n and 1 <= k <= n, got n={n}, right={right}, k={k}")
    return 1.0 - math.comb(n - right, k) / math.comb(n, k)


def _modes(mass: Sequence[float]) -> float:
    """exp(entropy) of non-negative masses: how many equally likely answers would be as spread. 0 if all are
    0.
    """
    total = sum(mass)
    if total <= 0:
        return 0.0
    return math.exp(-sum(m / total * math.log(m / total) for m in mass if m > 0))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def chosen(task: Task, split: str, limit: int) -> list[Problem]:
    """The first `limit` problems of a split, all of them for 0. Raises ValueError where there are none."""
    problems = list(task.problems(split))
    if not problems:
        raise ValueError(f"the {split} split of task {task.name!r} has no problems to evaluate")
    return problems[:limit] if limit else problems


def spread(total: int, count: int) -> set[int]:
    """`count` positions of `total`, evenly apart: the middles of equal parts."""
    count = min(count, total)
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4, ... up to n: the k at which pass@k is reported."""
    return [2**i for i in range(n.bit_length())]


class Evaluation(NamedTuple):
    """What an evaluation gave: its figures, and what they were made of, problem by problem."""

    figures: dict[str, float]
    problems: list[Problem]
    answers: list[list[Response]]
    rewards: list[float | None]  # flat, in the order of the answers
    reasons: dict[str, int]  # why responses could not be scored


def sampled(
    task: Task,
    split: str,
    sample: Sample,
    scorer: Scorer,
    cfg: EvalConfig,
    *,
    at_once: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Sample `cfg.samples` answers to each of at most `cfg.problems` problems of a split and score them.

    at_once: problems sampled and scored between two calls of progress(problems done, of how many); 0: all. A response
    is drawn by (`cfg.seed`, number of its problem, its place), so this changes no sample.

    The figures are accuracy (pass@1, with its standard error over problems in accuracy_se), pass@k for k = 1, 2, 4,
    ... up to the samples, reward, length (tokens with EOS), truncated (share without EOS),
    unscorable (share); and where the task knows equal answers: distinct (right answers per problem that
    differ), and with all solutions known distinct_share and effective_modes_share (of the solutions). The
    last two grow with the number of samples: `exact` has no such bias.
    Unscorable responses are left out of a problem's n; a problem with none left is left out.
    """
    problems = chosen(task, split, cfg.problems)
    answers: list[list[Response]] = []
    rewards: list[float | None] = []
    reasons: Counter[str] = Counter()
    step = at_once or len(problems)
    for first in range(0, len(problems), step):
        part = problems[first : first + step]
        rows = sample(part, cfg.samples, cfg.seed, first)
        answers += rows
        rewards += scorer.score(
            [problem for problem, row in zip(part, rows) for _ in row],
            [response.text for row in rows for response in row],
        )
        reasons += scorer.reasons
        if progress is not None:
            progress(len(answers), len(problems))
    figures = summarize(task, problems, answers, rewards, powers_of_two(cfg.samples))
    return Evaluation(figures, problems, answers, rewards, dict(reasons))


def summarize(
    task: Task,
    problems: Sequence[Problem],
    answers: Sequence[Sequence[Response]],
    rewards: Sequence[float | None],
    pass_at: Sequence[int],
) -> dict[str, float]:
    """The figures of `sampled` from responses already sampled; rewards are flat, in the order of the
    answers.
    """
    at = 0
    rates, rows = [], []  # per problem: share right; (n, right)
    distinct, distinct_share, modes, modes_share = [], [], [], []
    scored: list[float] = []
    notion = False
    for problem, row in zip(problems, answers):
        got = [(response, r) for response, r in zip(row, rewards[at : at + len(row)]) if r is not None]
        at += len(row)
        if not got:
            continue
        scored += [r for _, r in got]
        right = [response.text for response, r in got if task.correct(r)]
        rates.append(len(right) / len(got))
        rows.append((len(got), len(right)))
        keys = Counter(key for text in right if (key := task.canonical(problem, text)) is not None)
        solutions = task.solutions(problem)
        notion |= solutions is not None or bool(keys)
        distinct.append(float(len(keys)))
        modes.append(_modes(list(keys.values())))
        if solutions:
            distinct_share.append(len(keys) / len(solutions))
            modes_share.append(modes[-1] / len(solutions))
    responses = [response for row in answers for response in row]
    result = {
        "accuracy": _mean(rates),
        "accuracy_se": _standard_error(rates),
        "reward": _mean(scored),
        "length": _mean([float(response.tokens) for response in responses]),
        "truncated": _mean([float(not response.finished) for response in responses]),
        "unscorable": _mean([float(r is None) for r in rewards]),
        "problems": float(len(rates)),
    }
    for k in pass_at:
        if rows and all(n >= k for n, _ in rows):
            result[f"pass@{k}"] = _mean([pass_at_k(n, right, k) for n, right in rows])
    if notion:  # a task that never names a solution has no such figure, rather than 0
        result |= {"distinct": _mean(distinct), "effective_modes": _mean(modes)}
        if len(distinct_share) == len(rates):
            result |= {"distinct_share": _mean(distinct_share), "effective_modes_share": _mean(modes_share)}
    return result


def _standard_error(values: Sequence[float]) -> float:
    if len(values) < 2:
        return math.nan
    mean = _mean(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def log_partition(log_ref: Tensor, length: Tensor, reward: Tensor, beta: float, normalized: bool = True) -> float:
    """log Z of the flow-balance optimum over listed responses.

    log_ref, length, reward: [R]; log_ref the reference's log-probability of each response, length its tokens.
    normalized: solves sum_y exp(log_ref + |y| (beta r - log Z)) = 1, the optimum of the length-normalised
    residual (docs/maths.md); log Z is then per token. Otherwise log sum_y exp(log_ref + beta r). float64.
    """
    log_ref, length, reward = (x.double() for x in (log_ref, length, reward))
    if not normalized:
        return float(torch.logsumexp(log_ref + beta * reward, 0))
    if bool((length == length[0]).all()):
        return float(torch.logsumexp(log_ref + length * beta * reward, 0) / length[0])
    # the left side falls strictly in log Z: bisect between bounds where it is above and below 1
    free = torch.logsumexp(log_ref, 0).clamp(max=0.0)
    low = float(beta * reward.min() + free / length.min()) - 1e-9
    high = float(beta * reward.max()) + 1e-9
    for _ in range(100):
        middle = 0.5 * (low + high)
        above = float(torch.logsumexp(log_ref + length * (beta * reward - middle), 0)) > 0
        low, high = (middle, high) if above else (low, middle)
    return 0.5 * (low + high)


def exact(
    task: Task,
    split: str,
    logp: LogProbs,
    ref_logp: LogProbs | None = None,
    log_z: Callable[[list[Problem]], Tensor] | None = None,
    *,
    beta: float,
    cfg: EvalConfig,
    length_normalize: bool = True,
    tokens: Callable[[str], int] = lambda text: len(text) + 1,
    kl_problems: int | None = None,
) -> dict[str, float]:
    """The figures of `sampled` without sampling noise, for a task that lists its right answers.

    exact_accuracy: mass on right answers. exact_modes, exact_modes_share: exp(entropy) of that mass over
    canonical solutions, and as a share of their number. With ref_logp, where every well-formed response is
    listed: exact_kl, KL(policy || optimum) in nats per response, the optimum being
    ref * exp(|y| (beta r - log Z)) with the task's own reward, whatever the policy was trained on;
    log_z_exact; and with log_z (learned, [B], units of the loss) log_z_error, its mean distance from that.
    kl_problems: of how many problems, spread evenly, the figures that need ref_logp are taken (None: of all); they cost
    the probability of every well-formed response.
    Ill-formed responses enter the KL as one lump of reward 0 and of the longest listed length.
    Returns {} for a task that cannot list its right answers.
    """
    problems = chosen(task, split, cfg.problems)
    listed_for = spread(len(problems), len(problems) if kl_problems is None else kl_problems)
    accuracy, modes, share, kls, partitions = [], [], [], [], []
    for index, problem in enumerate(problems):
        texts = task.correct_texts(problem)
        if texts is None:
            return {}
        everything = task.responses(problem) if ref_logp is not None and index in listed_for else None
        listed = everything if everything is not None else [text for text, _ in texts]
        log_policy = logp([problem] * len(listed), listed).double().cpu()
        mass_of = dict(zip(listed, log_policy.exp().tolist()))
        by_solution: Counter[str] = Counter()
        for text, key in texts:
            by_solution[key] += mass_of[text]
        accuracy.append(float(sum(by_solution.values())))
        modes.append(_modes(list(by_solution.values())))
        share.append(modes[-1] / max(1, len(by_solution)))
        if ref_logp is None or everything is None:
            continue
        reward = torch.tensor([task.verify(problem, text) or 0.0 for text in listed], dtype=torch.float64)
        length = torch.tensor([float(tokens(text)) for text in listed], dtype=torch.float64)
        log_ref = ref_logp([problem] * len(listed), listed).double().cpu()
        p, ref, reward, length = _with_remainder(log_policy, log_ref, reward, length)
        partition = log_partition(ref, length, reward, beta, length_normalize)
        scale = length if length_normalize else torch.ones_like(length)
        optimum = ref + scale * (beta * reward) - (scale * partition if length_normalize else partition)
        kls.append(float((p.exp() * (p - optimum)).nan_to_num(0.0).sum()))
        partitions.append(partition)
    result = {
        "exact_accuracy": _mean(accuracy),
        "exact_modes": _mean(modes),
        "exact_modes_share": _mean(share),
    }
    if kls:
        result |= {"exact_kl": _mean(kls), "log_z_exact": _mean(partitions)}
        if log_z is not None:
            learned = log_z([problems[i] for i in sorted(listed_for)]).double().cpu().tolist()
            result["log_z_error"] = _mean([abs(a - b) for a, b in zip(learned, partitions)])
    return result


def _with_remainder(log_policy: Tensor, log_ref: Tensor, reward: Tensor, length: Tensor) -> tuple[Tensor, ...]:
    """Append one entry for all unlisted responses, so that both distributions add up to one."""

    def remainder(x: Tensor) -> Tensor:
        rest = -torch.expm1(torch.logsumexp(x, 0))
        return rest.clamp(min=1e-12).log().reshape(1)

    return (
        torch.cat([log_policy, remainder(log_policy)]),
        torch.cat([log_ref, remainder(log_ref)]),
        torch.cat([reward, reward.new_zeros(1)]),
        torch.cat([length, length.max().reshape(1)]),
    )
