"""What a step and an evaluation are reported by: counted here, written by `log`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from flowrl_kernels.trainer import mismatch, objective, parallel
from flowrl_kernels.trainer.batches import MicroBatch
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.evaluate import LogProbs, Response, Sample, exact, sampled
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.parts import frozen_start
from flowrl_kernels.trainer.policy import Scored
from flowrl_kernels.trainer.records import Lap, Progress, Result, Rollouts, Run, Text, Update
from flowrl_kernels.trainer.rollout import Engine, Sampling
from flowrl_kernels.trainer.rollout.stops import Stops
from flowrl_kernels.trainer.tasks import Problem

# the library's metrics under the names of a training log
NAMES = {
    "residual_mean_abs": "residual_abs",
    "residual_max_abs": "residual_max",
    "weight_mean": "weight",
    "clipped_low": "clip_low",
    "clipped_high": "clip_high",
    "log_ratio_old_mean": "ratio_old",
    "log_ratio_ref_mean": "ratio_ref",
    "log_z_mean": "log_z",
}


def of_step(
    run: Run,
    rollouts: Rollouts,
    updates: list[Update],
    results: list[Result],
    progress: Progress,
    lap: Lap,
    shown: list[MicroBatch],
    towards: list[MicroBatch],
) -> dict[str, float]:
    """The metrics of a step, the same on every rank; the one place where a step waits for its tensors.

    shown: the micro-batches whose log-probs are compared with the engine's. towards: those whose log-probs under the
    reference are known, if any are.
    """
    n = run.config.rollout.samples
    known = [r for r in rollouts.reward if r is not None]
    parts = {name: [r for r in part if r is not None] for name, part in rollouts.parts.items()}
    judged = next(iter(parts.values()), known)  # of several rewards the first says what is right
    groups = [rollouts.reward[i : i + n] for i in range(0, len(rollouts.reward), n)]
    mixed = [len({r for r in group if r is not None}) > 1 for group in groups]
    lengths = list(map(len, rollouts.responses))
    slots = sum(batch.ids.numel() for update in updates for batch in update.batches)
    fed = sum(int(batch.cu_seqlens[-1]) for update in updates for batch in update.batches)
    fed += sum(int(batch.prompt_cu_seqlens[-1]) - batch.sequences for u in updates for batch in u.batches)
    local: dict[str, tuple[float, float]] = {  # name -> (sum, count), added over ranks
        "reward": (sum(known), len(known)),
        "reward_square": (sum(r * r for r in known), len(known)),
        "accuracy": (sum(map(run.task.correct, judged)), len(judged)),
        **{f"reward/{name}": (math.fsum(part), len(part)) for name, part in parts.items()},
        "groups_mixed": (sum(mixed), len(mixed)),
        "entropy": (-float(rollouts.logp.double().sum()), sum(lengths)),
        "length": (sum(lengths), len(lengths)),
        "truncated": (float((~rollouts.finished).sum()), len(lengths)),
        "fill": (fed, slots),
        "tokens": (sum(lengths), 1.0 / run.world.size),
        **{name: (count, 1.0 / run.world.size) for name, count in run.scorer.take_counts().items()},
    }
    gaps, extreme = mismatch.of_step(run.config, shown)
    local |= gaps | kl_to_reference(towards)
    for result in results:
        for out, batch in result.outputs:
            for reported, value in out.metrics.items():
                if reported.startswith("mismatch"):  # of the whole step, above
                    continue
                name, number = NAMES.get(reported, reported), float(value)
                if name.endswith(("_max", "_min")):  # over the update; the others are means over sequences
                    sign = -1.0 if name.endswith("_min") else 1.0
                    extreme[name] = max(extreme.get(name, -math.inf), sign * number)
                else:
                    before = local.get(name, (0.0, 0.0))
                    local[name] = (before[0] + number * batch.sequences, before[1] + batch.sequences)
    merged = mismatch.finished(_merge(run, local, extreme))
    mean, square = merged["reward"], merged.pop("reward_square")
    seconds = sum(lap.seconds.values())
    return {
        **merged,
        "reward_std": math.sqrt(max(0.0, square - mean * mean)),
        "loss": float(np.mean([result.loss for result in results])),
        "grad_norm": float(np.mean([result.grad_norm for result in results])),
        "lr": results[-1].lr,
        "skipped": progress.skipped,
        "rows": sum(len(batch.ids) for update in updates for batch in update.batches),
        "tokens_per_s": merged["tokens"] / seconds,
        "time/step": seconds,
        **{f"time/{name}": value for name, value in lap.seconds.items()},
    }


def kl_to_reference(batches: list[MicroBatch]) -> dict[str, tuple[float, float]]:
    """KL(policy || reference), nats a token, as (sum, count): mean of exp(r) - 1 - r, r = ref - policy, as sampled.

    Unbiased and never negative (Schulman, http://joschu.net/blog/kl-approx.html, k3); {} where no reference was scored.
    """
    live = [batch.per_token for batch in batches if batch.live and "ref" in batch.per_token]
    if not live:
        return {}
    gap = torch.cat([(token["ref"] - token.get("old", token["sampler"])).double() for token in live])
    return {"kl_ref": (float((gap.expm1() - gap).sum()), float(len(gap)))}


def _merge(run: Run, local: dict[str, tuple[float, float]], extreme: dict[str, float]) -> dict[str, float]:
    sums: dict[str, tuple[float, float]] = {}
    most: dict[str, float] = {}
    for ranks_sums, ranks_most in parallel.gather((local, extreme), run.world):
        for name, (value, count) in ranks_sums.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = (before[0] + value, before[1] + count)
        for name, value in ranks_most.items():
            most[name] = max(most.get(name, -math.inf), value)
    out = {name: value / count if count else math.nan for name, (value, count) in sums.items()}
    out.update({name: -value if name.endswith("_min") else value for name, value in most.items()})
    return out


def samples(run: Run, rollouts: Rollouts, count: int) -> list[dict[str, object]]:
    """A few responses with their rewards, to read."""
    return [
        {
            "prompt": rollouts.problems[i].prompt,
            "response": rollouts.texts[i],
            "reward": rollouts.reward[i],
            **{f"reward/{name}": part[i] for name, part in rollouts.parts.items()},
        }
        for i in range(min(count, len(rollouts.texts)))
    ]


# ------------------------------------------------------------------------------------------------ evaluations


def evaluation(run: Run, split: str, *, last: bool = False) -> dict[str, float]:
    """Samples and scores a split; without sampling noise too where the task lists its right answers.

    For a row whose optimum is known, also the distance to it; the baselines are measured against the paper's.
    last: that distance over all problems, not over `eval.kl_problems` of them: it needs the probability of every
     well-formed response.
    """
    config, task = run.config, run.task
    at_once = max(1, config.rollout.batch // config.eval.samples) * run.world.size  # what the engine decodes at once
    out = sampled(
        task, split, sampler(run), run.scorer.first, config.eval, at_once=at_once,
        progress=partial(run.log.evaluating, split),
    ).figures  # fmt: skip
    if config.eval.exact:
        chosen = objective.row(config)
        listed = task.responses(task.problems(split)[0]) is not None and (last or config.eval.kl_problems > 0)
        # the baselines have no reference of their own
        reference = frozen_start(run) if listed and objective.has_optimum(config) else None
        scale = 1.0 if chosen.scale is None else chosen.scale
        learned = log_z_of(run) if reference is not None and run.policy.log_z is not None else None
        figures = exact(
            task,
            split,
            summed_logp(run, run.policy),
            None if reference is None else kept(summed_logp(run, reference), run.start_logp),
            # a (log pi - log ref) = beta r - log Z, divided by a where that is a number: exact() knows a = 1 and 1/|y|
            None if learned is None else lambda problems: learned(problems) / scale,
            beta=chosen.beta / scale,
            cfg=config.eval,
            length_normalize=chosen.scale is None,
            tokens=lambda text: len(run.text.tokenizer(text, add_special_tokens=False)["input_ids"]) + 1,
            kl_problems=None if last else config.eval.kl_problems,
        )
        out |= figures | {name: figures[name] * scale for name in ("log_z_exact", "log_z_error") if name in figures}
    return out


def kept(logp: LogProbs, known: dict[str, Tensor]) -> LogProbs:
    """`logp` of a frozen model, computed once for each problem's listed responses and kept in `known`."""

    def once(problems: list[Problem], texts: list[str]) -> Tensor:
        key = f"{problems[0].id} {problems[0].prompt!r} {hash(tuple(texts))}"
        if key not in known:
            known[key] = logp(problems, texts)
        return known[key]

    return once


def last_split(run: Run) -> str:
    """The split a run is judged on: test, where there is none valid, then train."""
    return next(name for name in ("test", "valid", "train") if len(run.task.problems(name)))


def sampler(run: Run) -> Sample:
    """evaluate's `sample` with the run's policy."""
    return make_sampler(
        run.engine, run.text, evaluation_sampling(run.config, run.sampling.stop, run.sampling.stops), run.world
    )


def evaluation_sampling(config: Config, stop: tuple[int, ...], stops: Stops | None) -> Sampling:
    """How an evaluation draws."""
    e = config.eval
    return Sampling(config.rollout.max_new_tokens, e.temperature, stop, top_p=e.top_p, top_k=e.top_k, stops=stops)


def make_sampler(engine: Engine, text: Text, sampling: Sampling, world: World) -> Sample:
    """Each rank generates for its share of the problems, then every rank gets all responses."""

    def sample(problems: Sequence[Problem], n: int, seed: int, first: int = 0) -> list[list[Response]]:
        mine = list(range(world.rank, len(problems), world.size)) or [0]
        out = engine.generate([text.encode(problems[i]) for i in mine], n, sampling, seed, [first + i for i in mine])
        lengths = out.length.tolist()
        texts = text.decode([out.tokens[b, :length].tolist() for b, length in enumerate(lengths)])
        rows = [Response(*row) for row in zip(texts, lengths, out.finished.tolist())]
        found = {i: rows[k * n : (k + 1) * n] for k, i in enumerate(mine)}
        for other in parallel.gather(found, world):
            found |= other
        return [found[i] for i in range(len(problems))]

    return sample


def summed_logp(run: Run, policy: Scored) -> LogProbs:
    """evaluate's `LogProbs`: log-probability of each text and its end token, float64, on the CPU."""

    @torch.no_grad()
    def logp(problems: list[Problem], texts: list[str]) -> Tensor:
        prompts = [np.asarray(run.text.encode(problem)) for problem in problems]
        tokens = run.text.tokenizer(texts, add_special_tokens=False)["input_ids"]
        answers = [np.asarray(ids + [run.text.tokenizer.eos_token_id]) for ids in tokens]
        out = torch.zeros(len(texts), dtype=torch.float64)
        for batch in run.packed(range(len(prompts)), prompts, answers, policy):
            scored = policy(objective.score_head(run.config, batch), batch.ids, batch.positions, branch=batch.branch)
            total = scored.logp.new_zeros(batch.sequences, dtype=torch.float64)
            total.index_add_(0, batch.segment(), scored.logp.double())
            out[batch.which.cpu()] = total.cpu()
        return out

    return logp


def log_z_of(run: Run) -> Callable[[list[Problem]], Tensor]:
    """evaluate's `log_z`: the learned log Z of each prompt, on the CPU."""

    @torch.no_grad()
    def log_z(problems: list[Problem]) -> Tensor:
        prompts = [np.asarray(run.text.encode(problem)) for problem in problems]
        dummy = [np.asarray([run.text.tokenizer.eos_token_id])] * len(prompts)
        out = torch.zeros(len(prompts))
        assert run.policy.log_z is not None
        run.policy.log_z.eval()
        for batch in run.packed(range(len(prompts)), prompts, dummy, run.policy):
            value = run.policy(
                lambda actor, hidden, b=batch: objective.log_z(actor, hidden, b),
                batch.ids,
                batch.positions,
                branch=batch.branch,
            )
            out[batch.which.cpu()] = value.float().cpu()
        run.policy.log_z.train()
        return out

    return log_z
