"""Which part explains the gap: every row measured, the best one named if it stands out, else nothing is."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.trainer.doctor.case import Case
from flowrl_kernels.trainer.doctor.parts import KEPT, PARTS, ROWS, TOKENS, Row, Swap, left

# thresholds, in nats; fixed before the clean runs
FLOOR = 1e-4  # rms gap of float32 engines: kernels differ by 2e-5
EXACT = 0.05  # an explanation leaves at most this share of the gap, or the floor
CLOSE = 3.0  # explanations this close to the best one compete by how few numbers they fit
NOISY = 0.8  # roundings: leaves at most this share, predicts the right size within 2, and beats the others by MARGIN
MARGIN = 1.1
CHANCE = math.log(1e-6)  # of draws that all fall where truncation would leave them


class Measured(NamedTuple):
    """A row's best swap."""

    row: Row
    swap: Swap
    left: float  # rms, nats
    explains: float  # share of the squared gap
    ess: float  # effective samples at the run's length, if this were all


class Diagnosis(NamedTuple):
    """culprit: a row's name or a finding's, None where all is well, "unexplained" where nothing explains the gap."""

    culprit: str | None
    detail: str
    advice: str
    gap: dict[str, float]
    measured: list[Measured]  # what was tried, best first
    findings: list[tuple[str, str, str]]  # (name, detail, part) that show in the tokens and not in the log-probs

    def contents(self) -> dict[str, Any]:
        """For a JSON file."""
        return {
            "culprit": self.culprit,
            "detail": self.detail,
            "advice": self.advice,
            "gap": self.gap,
            "findings": [{"name": n, "detail": d, "part": p} for n, d, p in self.findings],
            "tried": [
                {
                    "name": m.row.name, "part": m.row.part, "detail": m.swap.detail, "fitted": m.swap.fitted,
                    "left": m.left, "explains": m.explains, "effective_samples": m.ess,
                }
                for m in self.measured
            ],
        }  # fmt: skip


def effective(case: Case, gap: Tensor, length: int) -> float:
    """Share of effective samples at `length` tokens: exp(-variance of the summed gap), which grows with the length."""
    sums = torch.zeros(len(case.responses), dtype=torch.float64, device=gap.device).index_add_(0, case.owner, gap)
    lengths = torch.bincount(case.owner, minlength=len(case.responses)).double()
    rate = float((sums - gap.mean() * lengths).square().sum() / lengths.sum())
    return math.exp(-min(rate * length, 700.0))


@torch.no_grad()
def examine(case: Case, length: int | None = None) -> Diagnosis:
    """Names what explains the gap.

    Args:
        length: tokens of the run's responses, for the loss of effective samples; the sampling's budget.
    """
    length = length or case.sampling.max_new_tokens
    gap, size = case.gap, left(case, case.trainer)
    figures = {
        "tokens": float(len(gap)),
        "rms": size,
        "largest": float(gap.abs().max()),
        "kl": float(gap.mean()),
        "k3": float(((-gap).clamp(-60, 60).exp() - 1 + gap).mean()),
        "length": float(length),
        "effective_samples": effective(case, gap, length),
    }
    findings = in_tokens(case)
    measured: list[Measured] = []
    best: Measured | None = None
    if not size <= FLOOR:  # NaN too
        for cost in (0, 1, 2):
            for row in (row for row in ROWS if row.cost == cost):
                swaps = [(left(case, swap.logp), swap) for swap in row.swaps(case)]
                if not swaps:
                    continue
                least = min(rest for rest, _ in swaps)
                near = [pair for pair in swaps if pair[0] <= max(CLOSE * least, FLOOR)]
                rest, swap = min(near, key=lambda pair: pair[1].fitted)
                explains = max(0.0, 1.0 - (rest / size) ** 2)
                ess = effective(case, swap.logp - case.trainer, length)
                measured.append(Measured(row, swap, rest, explains, ess))
            best = stands_out(measured, size, last=cost == 2, case=case)
            if best is not None and not best.row.noisy:
                break
    elif not findings:
        findings = in_draws(case)
    measured.sort(key=lambda m: m.left)
    if best is not None:
        return Diagnosis(best.row.name, best.swap.detail, best.row.advice, figures, measured, findings)
    if not size <= FLOOR:
        what = f"{measured[0].row.name} explains most" if measured else "no part could be swapped"
        return Diagnosis("unexplained", what, "compare the two models layer by layer", figures, measured, findings)
    if findings:
        name, detail, _ = findings[0]
        return Diagnosis(name, detail, ADVICE[name], figures, measured, findings)
    return Diagnosis(None, "the engine and the trainer agree", "", figures, measured, findings)


def stands_out(measured: list[Measured], size: float, *, last: bool, case: Case) -> Measured | None:
    """The explanation, if one leaves next to nothing; at the end, roundings that explain a good part."""
    if not measured:
        return None
    exact = [m for m in measured if m.left <= max(EXACT * size, FLOOR)]
    if exact:
        least = min(m.left for m in exact)
        near = [m for m in exact if m.left <= max(CLOSE * least, FLOOR)]
        return min(near, key=lambda m: (m.swap.fitted, ROWS.index(m.row)))
    if not last:
        return None
    ranked = sorted(measured, key=lambda m: m.left)
    first = next((m for m in ranked if m.row.noisy), None)
    if first is None or first.left > NOISY * size:
        return None
    others = [m.left for m in ranked if not m.row.noisy]
    predicted = float((first.swap.logp - case.trainer).square().mean().sqrt())
    sized = 0.5 * size <= predicted <= 2.0 * size
    return first if sized and all(rest >= MARGIN * first.left for rest in others) else None


END, SILENT, OUTSIDE, NARROW = (
    "end token dropped", "kept sets not returned", "kept set without its token", "truncated sampling left on"
)  # fmt: skip
ADVICE = {
    END: "keep the stop token in the response and in its log-probs: the last decision is trained too",
    SILENT: "draws are truncated and the engine does not tell what they were left with: no ratio can be right",
    OUTSIDE: "the kept sets are not those of the tokens beside them",
    NARROW: "set top-p, top-k and min-p of the engine to those of the run",
}


def in_tokens(case: Case) -> list[tuple[str, str, str]]:
    """What shows in the tokens themselves."""
    found = []
    stop, budget = set(case.sampling.stop), case.sampling.max_new_tokens
    ended = [row for row, done in zip(case.responses, case.finished) if done or len(row) < budget]
    without = [row for row in ended if row[-1] not in stop]
    if stop and without:
        found.append((END, f"{len(without)} of {len(ended)} responses that ended have no end token", TOKENS))
    if case.sampling.truncated and case.kept is None:
        found.append((SILENT, "the declared sampling is truncated", KEPT))
    if case.kept is not None:
        rows = case.kept.offsets.diff()
        mine = case.target.cpu().repeat_interleave(rows)
        inside = torch.zeros(len(rows), dtype=torch.bool)
        inside[torch.arange(len(rows)).repeat_interleave(rows)[case.kept.ids.long() == mine]] = True
        if not bool(inside.all()):
            found.append((OUTSIDE, f"{int((~inside).sum())} of {len(rows)} tokens", KEPT))
    return found


def in_draws(case: Case) -> list[tuple[str, str, str]]:
    """Draws that never fall into the tail, where the log-probs say they should: truncation under raw log-probs.

    The smallest top-p (and top-k) that holds every draw; under the whole distribution all of them fall inside with the
    product of what it keeps.
    """
    if case.sampling.truncated:
        return []
    z = (case.z / case.temperature).double()
    p, order = torch.softmax(z, -1).sort(-1, descending=True)
    rank = (order == case.target[:, None]).int().argmax(-1)  # [N]
    cumulative = p.cumsum(-1)
    above = (cumulative - p).gather(1, rank[:, None])[:, 0]
    edge, most = float(above.max()), int(rank.max()) + 1
    inside = (cumulative - p) <= edge + 1e-12
    by_p = float((p * inside).sum(-1).log().sum())
    by_k = float(cumulative[:, most - 1].clamp(max=1.0).log().sum())
    if min(by_p, by_k) > CHANCE:
        return []
    what = f"top-p about {edge:.2f}" if by_p < by_k else f"top-k {most}"
    return [(NARROW, f"{what}: no draw fell outside (chance e^{min(by_p, by_k):.0f})", KEPT)]


def parts_of(found: Diagnosis) -> list[tuple[str, Measured | None]]:
    """The best swap of each part, in the order of a page."""
    return [(part, next((m for m in found.measured if m.row.part == part), None)) for part in PARTS]
