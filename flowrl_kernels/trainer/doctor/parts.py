"""The hypotheses, one row each: what is swapped, and the log-probs that follow from it.

A row gives no verdict. `examine` takes the one whose log-probs are the engine's, of several the one with the fewest
numbers fitted, of those the first.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_kernels.hf.head import HeadScales
from flowrl_kernels.trainer.doctor.case import Case
from flowrl_kernels.trainer.rollout.base import Sampling, kept_tokens

FEW = 4  # tensors, and biased tokens, that one explanation may name


class Swap(NamedTuple):
    """One part swapped."""

    detail: str
    logp: Tensor  # [N] float64 that the engine would have reported
    fitted: int = 0  # numbers that were chosen to make it so


class Row(NamedTuple):
    name: str
    part: str
    cost: int  # 0: from the logits that are there, 1: a few passes through the model, 2: one for each tensor
    swaps: Callable[[Case], Iterator[Swap]]
    advice: str
    noisy: bool = False  # roundings, which another order of sums rounds otherwise: explained in part at best


def left(case: Case, logp: Tensor) -> float:
    """Root mean square of what the engine's log-probs are away from these, nats."""
    return float((case.engine - logp).square().mean().sqrt())


def fit(case: Case, of: Callable[[float], Tensor], low: float, high: float, grid: int = 25) -> tuple[float, Tensor]:
    """The number that leaves least: over a grid, then by the golden section around the best of it."""
    points = [low + (high - low) * i / (grid - 1) for i in range(grid)]
    best = min(range(grid), key=lambda i: left(case, of(points[i])))
    a, b = points[max(best - 1, 0)], points[min(best + 1, grid - 1)]
    share = (math.sqrt(5) - 1) / 2
    x, y = b - share * (b - a), a + share * (b - a)
    fx, fy = left(case, of(x)), left(case, of(y))
    for _ in range(26):
        if fx < fy:
            b, y, fy = y, x, fx
            x = b - share * (b - a)
            fx = left(case, of(x))
        else:
            a, x, fx = x, y, fy
            y = a + share * (b - a)
            fy = left(case, of(y))
    found = x if fx < fy else y
    return found, of(found)


# ------------------------------------------------------------------------------------------------ processors


def trainer_temperature(case: Case) -> Iterator[Swap]:
    if case.temperature != case.sampling.temperature:
        yield Swap(f"scored at {case.sampling.temperature:g}", case.logp(case.z, case.sampling.temperature))


def sampler_temperature(case: Case) -> Iterator[Swap]:
    if case.temperature != 1.0:
        yield Swap("sampled at 1", case.logp(case.z, 1.0))


def other_temperature(case: Case) -> Iterator[Swap]:
    value, logp = fit(case, lambda x: case.logp(case.z, math.exp(x)), math.log(0.1), math.log(10.0))
    yield Swap(f"sampled at {math.exp(value):.4g}", logp, 1)


def repetition(case: Case) -> Iterator[Swap]:
    for prompt in (True, False):
        seen = case.seen(prompt)

        def penalized(x: float, seen: Tensor = seen) -> Tensor:
            return case.logp(torch.where(seen, torch.where(case.z > 0, case.z / x, case.z * x), case.z))

        value, logp = fit(case, penalized, 0.5, 2.0)
        where = "prompt and response" if prompt else "the response"
        yield Swap(f"repetition penalty {value:.4g} over {where}", logp, 1)
    value, logp = fit(case, lambda x: case.logp(case.z - x * seen), -2.0, 2.0)
    yield Swap(f"presence penalty {value:.4g}", logp, 1)


def bias(case: Case) -> Iterator[Swap]:
    """Greedily the token whose logit, moved, explains most; every bias fitted again after each."""
    p0 = torch.zeros(case.z.shape[1], device=case.device)
    chosen: list[int] = []
    logp = case.trainer
    for _ in range(FEW):
        p = torch.softmax((case.z + p0) / case.temperature, -1)
        off = (case.engine - logp).float()
        count = torch.bincount(case.target, minlength=len(p0)).float()
        own = torch.zeros_like(p0).index_add_(0, case.target, off)
        mass = torch.zeros_like(p0).index_add_(0, case.target, p.gather(1, case.target[:, None])[:, 0])
        gain = (own - off @ p).square() / (p.square().sum(0) - 2 * mass + count).clamp_min(1e-9)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        for token in (chosen[-1:] + chosen) if len(chosen) > 1 else chosen:

            def moved(x: float, token: int = token) -> Tensor:
                value = p0.clone()
                value[token] = x
                return case.logp(case.z + value)

            x, logp = fit(case, moved, -10.0, 10.0, 41)
            p0[token] = x
        text = ", ".join(f"{float(p0[token]):+.3g} on token {token}" for token in chosen)
        yield Swap(f"logit bias {text}", logp, 2 * len(chosen))


def no_softcap(case: Case) -> Iterator[Swap]:
    scales, hidden = case.policy.scales, None
    others = {
        "without the soft-cap": HeadScales(scales.logit_scale, None),
        "without the logit scale": HeadScales(1.0, scales.softcap),
        "without both": HeadScales(1.0, None),
    }
    for detail, other in others.items():
        if other != scales:
            hidden = case.hidden() if hidden is None else hidden
            yield Swap(detail, case.logp(case.logits(hidden, scales=other)))


# ------------------------------------------------------------------------------------------------ kept sets


def whole(case: Case) -> Iterator[Swap]:
    if case.sampling.truncated:
        yield Swap("log-probs over the whole vocabulary", case.logp(case.z, mask=None))


def truncated(case: Case) -> Iterator[Swap]:
    """The kept sets that the engine's normaliser tells: it is pi(K), and K is the head of the sorted tokens."""
    z = case.z / case.temperature
    p, _ = torch.softmax(z.double(), -1).sort(-1, descending=True)
    cumulative = p.cumsum(-1)
    mass = (-(case.engine - case.logp(case.z, mask=None))).exp().clamp(max=1.0)
    size = (cumulative - mass[:, None]).abs().argmin(-1)  # the last token kept, by rank
    cut = mass < 1.0 - 1e-6
    if not bool(cut.any()):
        return
    top_k = int((size[cut] + 1).median())
    yield Swap(f"top-k {top_k}", _over(case, z, Sampling(1, top_k=top_k)), 1)
    least = float(mass.min())
    tried = {least, math.floor(least * 100) / 100, math.floor(least * 20) / 20, math.floor(least * 10) / 10}
    swaps = [Swap(f"top-p {x:.4g}", _over(case, z, Sampling(1, top_p=x)), 1) for x in tried if 0 < x < 1]
    yield min(swaps, key=lambda swap: left(case, swap.logp))
    share = p.gather(1, size[:, None])[:, 0] / p[:, 0]
    below = p.gather(1, (size + 1).clamp(max=p.shape[1] - 1)[:, None])[:, 0] / p[:, 0]
    edge = float((share[cut].min() + below[cut].max()) / 2)  # between what was kept and what was not
    yield Swap(f"min-p {edge:.3g}", _over(case, z, Sampling(1, min_p=min(max(edge, 0.0), 1.0))), 1)


def _over(case: Case, z: Tensor, sampling: Sampling) -> Tensor:
    return case.logp(case.z, mask=kept_tokens(z, sampling).scatter(1, case.target[:, None], True))


# ------------------------------------------------------------------------------------------------ precision


def half_head(case: Case) -> Iterator[Swap]:
    hidden = case.hidden()
    yield Swap("logits rounded to bfloat16", case.logp(case.logits(hidden, half="logits")))
    yield Swap("the head's inputs rounded to bfloat16", case.logp(case.logits(hidden, half="inputs")))


def half_backbone(case: Case) -> Iterator[Swap]:
    hidden = case.hidden(case.half_model)
    yield Swap("states in bfloat16, logits in float32", case.logp(case.logits(hidden)))
    yield Swap("states and head's weight in bfloat16, sums in float32", case.logp(case.logits(hidden, half="inputs")))


def half_model(case: Case) -> Iterator[Swap]:
    hidden = case.hidden(case.half_model)
    yield Swap("states and logits in bfloat16", case.logp(case.logits(hidden, half="logits")))


# ------------------------------------------------------------------------------------------------ weights


def adapters_off(case: Case) -> Iterator[Swap]:
    zeros = {
        name: torch.zeros_like(tensor) for name, tensor in case.policy.model.named_parameters() if ".lora_B." in name
    }
    if zeros:
        with case.swapped(zeros):
            yield Swap(f"{len(zeros)} adapters off", case.logp(case.logits(case.hidden())))


def stale(case: Case) -> Iterator[Swap]:
    for name, tensors in case.setting.history.items():
        with case.swapped(tensors):
            yield Swap(f"the weights of {name}", case.logp(case.logits(case.hidden())))


def stale_head(case: Case) -> Iterator[Swap]:
    if not case.tied:
        return
    own = {id(tensor): name for name, tensor in case.policy.model.named_parameters()}[id(case.policy.head.weight)]
    hidden = case.hidden()
    for name, tensors in case.setting.history.items():
        if own in tensors:
            weight = tensors[own].to(case.policy.head.weight)
            yield Swap(f"a head of its own, of {name}", case.logp(case.logits(hidden, weight)))


def some_tensors(case: Case) -> Iterator[Swap]:
    """Greedily the tensor that, taken from earlier weights, explains most."""
    own = dict(case.policy.model.named_parameters())
    for version, tensors in case.setting.history.items():
        moved = {n: t for n, t in tensors.items() if n in own and not torch.equal(t.to(own[n]), own[n])}
        chosen: list[str] = []
        before = left(case, case.trainer)
        while len(chosen) < min(FEW, len(moved)):
            best: tuple[float, str, Tensor] | None = None
            for name in moved:
                if name in chosen:
                    continue
                with case.swapped({n: moved[n] for n in (*chosen, name)}):
                    logp = case.logp(case.logits(case.hidden()))
                if best is None or left(case, logp) < best[0]:
                    best = left(case, logp), name, logp
            assert best is not None
            if best[0] > 0.9 * before:  # one more does not help
                break
            before = best[0]
            chosen.append(best[1])
            yield Swap(f"{', '.join(chosen)} of {version}", best[2], len(chosen) - 1)


def layers_swapped(case: Case) -> Iterator[Swap]:
    count = 0 if case.layers is None else len(case.layers)
    for i, j in itertools.combinations(range(count), 2):
        with case.layers_swapped(i, j):
            yield Swap(f"layers {i} and {j} in each other's place", case.logp(case.logits(case.hidden())))


# ------------------------------------------------------------------------------------------------ positions, prompts


def positions(case: Case) -> Iterator[Swap]:
    for prompt, response in ((0, 1), (0, -1), (1, 1), (1, 0), (-1, -1)):
        detail = f"positions of the prompt {prompt:+d}, of the response {response:+d}"
        yield Swap(detail, case.logp(case.logits(case.hidden(shift=(prompt, response)))))


def rope_base(case: Case) -> Iterator[Swap]:
    name = next((n for n, _ in case.policy.model.named_buffers() if n.endswith("rotary_emb.inv_freq")), None)
    if name is None:
        return
    own = dict(case.policy.model.named_buffers())[name]
    steps = torch.arange(len(own), device=own.device, dtype=torch.float64) / len(own)

    def at(base: float) -> Tensor:
        with case.swapped({name: (base**-steps).float()}):
            return case.logp(case.logits(case.hidden()))

    for base in (1e4, 1e5, 2.5e5, 5e5, 1e6, 5e6, 1e7):
        if not torch.allclose((base**-steps).to(own), own, rtol=1e-4):
            yield Swap(f"rope base {base:g}", at(base))


def prompts(case: Case) -> Iterator[Swap]:
    for name, written in case.setting.prompts.items():
        ids = [list(written[which]) for which in case.which]
        if all(ids) and ids != case.prompts:
            yield Swap(f"the prompt {name}", case.logp(case.logits(case.hidden(prompts=ids))))


PROCESSORS, KEPT, HEAD, BACKBONE = "temperature and processors", "kept set", "head", "backbone"
WEIGHTS, TOKENS = "weights", "template and tokens"
PARTS = (TOKENS, WEIGHTS, BACKBONE, HEAD, PROCESSORS, KEPT)

ROWS = (
    Row("temperature left out of the trainer", PROCESSORS, 0, trainer_temperature,
        "score at the sampling temperature: rollout.temperature is what every log-probability is taken at"),
    Row("temperature left out of the sampler", PROCESSORS, 0, sampler_temperature,
        "have the engine report processed log-probs and see that it receives the temperature"),
    Row("log-probs of the whole distribution", KEPT, 0, whole,
        "have the engine report processed log-probs: those over the tokens it kept"),
    Row("soft-cap or logit scale left out", HEAD, 0, no_softcap, "the engine's model lacks the head's scales"),
    Row("truncated sampling left on", KEPT, 0, truncated,
        "set top-p, top-k and min-p of the engine to those of the run; a server's defaults come from "
        "generation_config.json"),
    Row("another temperature", PROCESSORS, 0, other_temperature, "the temperature is set in two places, or twice"),
    Row("a repetition penalty", PROCESSORS, 0, repetition,
        "set the engine's penalties to none; a server's defaults come from generation_config.json"),
    Row("a logit bias", PROCESSORS, 0, bias, "leave out logit_bias, bad words and allowed tokens"),
    Row("a bfloat16 head", HEAD, 1, half_head, "have the engine compute its logits in float32", noisy=True),
    Row("adapters not merged", WEIGHTS, 1, adapters_off, "push merged weights, or load the adapters in the engine"),
    Row("stale weights", WEIGHTS, 1, stale, "a push was lost or is late: probe after each one"),
    Row("a tied head that is stale", WEIGHTS, 1, stale_head, "the engine untied the head: push it by its own name"),
    Row("another prompt", TOKENS, 1, prompts, "send token ids, and make them with one tokenizer and template"),
    Row("positions", BACKBONE, 1, positions, "count positions from the prompt's first token, without gaps"),
    Row("another rope base", BACKBONE, 1, rope_base, "compare rope_theta of the two config.json"),
    Row("a bfloat16 backbone", BACKBONE, 1, half_backbone,
        "run the engine in float32, or correct the gap (algorithm.correction)", noisy=True),
    Row("a bfloat16 model", BACKBONE, 1, half_model,
        "run the engine in float32, or its head at least, and correct the gap (algorithm.correction)", noisy=True),
    Row("layers swapped", WEIGHTS, 2, layers_swapped, "the engine loads layers by place and not by name"),
    Row("tensors not updated", WEIGHTS, 2, some_tensors, "the engine's loader skips these names"),
)  # fmt: skip
