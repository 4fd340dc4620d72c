"""`flowrl doctor`: a run, or a model folder, with the engine it samples by; one page and a JSON."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowrl_kernels.trainer import checkpoint, config_file, export, parallel, policy, report
from flowrl_kernels.trainer.config import Config, check
from flowrl_kernels.trainer.doctor.case import Setting, collect
from flowrl_kernels.trainer.doctor.examine import EXACT, FLOOR, Diagnosis, examine, parts_of
from flowrl_kernels.trainer.doctor.prompts import rewritten
from flowrl_kernels.trainer.parts import make_engine, make_text, stop_tokens
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.tasks import build_task


def doctor(
    source: str,
    args: list[str],
    *,
    settings: str | None = None,
    prompts: int = 8,
    samples: int = 8,
    out: str | None = None,
) -> Diagnosis:
    """Samples by the configured engine and says where its log-probs part from the trainer's.

    Of a run with two checkpoints the engine is given the older weights first and then the newer ones, as a run does, so
    a push that is lost or late shows.

    Args:
        source, args, settings: as `export.evaluate_run` has them.
        prompts, samples: how many prompts, and responses to each.
        out: the JSON file; by default doctor.json in the run's folder, or here.

    Raises:
        ValueError, FileNotFoundError: naming what is missing.
    """
    config, newest = export.open_source(source, settings)
    run = Path(source).expanduser() if newest is not None else None
    config = config_file.expand(config_file.override(export.single(config), args, "flowrl doctor RUN_OR_FOLDER"))
    export.refuse_code_of(run, config)
    world = export.start(config)
    check(config)
    task = build_task(config.task)
    tokenizer = policy.load_tokenizer(export.source_of(config), config.model) if newest is not None else None
    text = make_text(config, task, tokenizer)
    actor, history = before_and_after(config, newest, world)
    problems = list(task.problems("train"))[:prompts]
    if not problems:
        raise ValueError("task.train: there are no prompts to sample")
    ids = [text.encode(problem) for problem in problems]
    r = config.rollout
    sampling = Sampling(
        r.max_new_tokens, r.temperature, stop_tokens(actor, text.tokenizer), top_p=r.top_p, top_k=r.top_k, min_p=r.min_p
    )
    texts = [p.prompt if isinstance(p.prompt, str) else list(p.prompt) for p in problems]
    setting = Setting(history, rewritten(text.tokenizer, texts, ids, config.task.system))
    engine = make_engine(config, actor, world)
    try:
        for number, tensors in enumerate([*reversed(history.values()), dict(policy.named_weights(actor))]):
            engine.update_weights(iter(tensors.items()), number)
        case = collect(actor, engine, ids, sampling, n=samples, seed=config.run.seed, setting=setting)
    finally:
        getattr(engine, "close", lambda: None)()  # of those that have something to close
    found = examine(case)
    about = f"{source}, engine {r.engine}, temperature {r.temperature:g}"
    show(found, about)
    place = Path(out).expanduser() if out else (run or Path()) / "doctor.json"
    print(report.save(place, {"source": str(source), "engine": r.engine, **found.contents()}))
    return found


def before_and_after(
    config: Config, newest: Path | None, world: parallel.World
) -> tuple[policy.Policy, dict[str, Mapping[str, Tensor]]]:
    """The policy, and the weights that a run had before it: of its last checkpoint but one, and of its start."""
    history: dict[str, Mapping[str, Tensor]] = {}
    if newest is None:
        attention = parallel.attention_of(config.model, config.parallel, world.device)
        return policy.make_policy(config, world, policy.load_model(config.model.name, config.model, attention)), history
    actor = export.restore(config, newest, world)
    steps = [path for path in checkpoint.whole(Path(config.run.dir)) if path != newest]
    if steps:
        before = export.restore(config, max(steps, key=checkpoint.step_of), world)
        history[f"{max(steps, key=checkpoint.step_of).name}, the checkpoint before"] = tensors_of(before)
    attention = parallel.attention_of(config.model, config.parallel, world.device)
    model = policy.load_model(export.source_of(config), config.model, attention)
    history["the start"] = {name: tensor.detach() for name, tensor in model.to(world.device).state_dict().items()}
    return actor, history


def tensors_of(actor: policy.Policy) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in policy.named_weights(actor)}


def show(found: Diagnosis, about: str) -> None:
    """One page: the gap, what each part would explain of it, and the verdict."""
    gap, length = found.gap, int(found.gap["length"])
    print(f"{about}, {int(gap['tokens'])} tokens")
    kl = f"KL {gap['kl']:.2g} (k1), {gap['k3']:.2g} (k3)"
    print(f"sampler - trainer, nats a token: rms {gap['rms']:.2g}, largest {gap['largest']:.2g}, {kl}")
    print(f"effective samples at {length} tokens: {gap['effective_samples']:.1%}")
    if found.measured:
        lines: list[dict[str, Any]] = []
        for part, best in parts_of(found):
            if best is None:
                lines.append({"part": part, "best of it": "not tried", "left": "", "explains": "", "costs": ""})
            else:
                lines.append(
                    {
                        "part": part,
                        "best of it": f"{best.row.name}: {best.swap.detail}",
                        "left": f"{best.left:.1e}",
                        "explains": f"{best.explains:.1%}",
                        "costs": f"{1.0 - best.ess:.1%}" if best.explains > 0.005 else "",
                    }
                )
        table(lines)
        print(f"left: rms after the swap. explains: of the squared gap. costs: effective samples at {length} tokens.")
        print(
            f"Named is what leaves at most {EXACT:.0%} of the gap (or {FLOOR:g}); of several, what fits fewer numbers."
        )
    else:
        print(f"no part was swapped: the gap is under {FLOOR:g}")
    for name, detail, part in found.findings:
        print(f"{part}: {name}: {detail}")
    verdict = "no fault found" if found.culprit is None else f"{found.culprit} ({found.detail})"
    print(f"\nverdict: {verdict}" + (f"\n{found.advice}" if found.advice else ""))


def table(lines: list[dict[str, Any]]) -> None:
    """Columns as wide as what they hold, the second one cut to the page."""
    names = list(lines[0])
    width = {name: max(len(name), *(len(str(line[name])) for line in lines)) for name in names}
    width["best of it"] = min(width["best of it"], 64)
    for line in [dict(zip(names, names)), *lines]:
        print("  ".join(str(line[name])[: width[name]].ljust(width[name]) for name in names).rstrip())
