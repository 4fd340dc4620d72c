"""What is done with a finished run, in one process: a Hugging Face folder, an evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl_kernels.trainer import checkpoint, config_file, losses, parallel, policy
from flowrl_kernels.trainer.config import Config

if TYPE_CHECKING:
    from flowrl_kernels.trainer.parallel import World


def open_run(folder: Path) -> tuple[Config, Path]:
    """A run's resolved configuration and newest checkpoint.

    Raises:
        FileNotFoundError: no run, or no checkpoint yet.
    """
    if not (folder / "config.toml").is_file():
        raise FileNotFoundError(f"{folder} holds no run (no config.toml in it)")
    newest = checkpoint.latest(folder)
    if newest is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    config = config_file.load(folder / "config.toml")
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder))), newest


def source_of(config: Config) -> str:
    """The folder or name that a run's model and tokenizer were read from."""
    start = Path(config.run.dir) / "start"
    return str(start) if start.exists() else config.model.name


def restore(config: Config, newest: Path, world: World) -> policy.Policy:
    """The policy of a checkpoint, whole and in one process, however many ranks wrote it."""
    folder, source = Path(config.run.dir), source_of(config)
    needs = losses.needs(config)
    model = policy.load_model(source, config.model, parallel.attention_of(config.model, config.parallel, world.device))
    actor = policy.make_policy(config, world, model, log_z=needs.log_z, value=needs.value)
    checkpoint.load_model(newest, folder, actor)
    return actor


def single(config: Config) -> tuple[Config, World]:
    """The same run in one un-sharded float32 process."""
    config = dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, dtype="float32", replicate=1))
    return config, parallel.start(config.run, config.parallel)


def export_run(folder: Path, out: Path) -> None:
    """Writes a run's newest checkpoint as a Hugging Face folder, log Z beside it in `log_z.safetensors`.

    Raises:
        FileNotFoundError: there is no run or no checkpoint.
        ValueError: `out` exists.
    """
    config, newest = open_run(folder)
    if out.exists():
        raise ValueError(f"{out} exists already")
    config, world = single(config)
    actor = restore(config, newest, world)
    policy.save_folder(actor, policy.load_tokenizer(source_of(config), config.model), out, world)


def evaluate_run(source: str, args: list[str]) -> dict[str, float]:
    """Samples and scores a split with a run's policy, or with a Hugging Face model under a config.

    Args:
        source: a run folder, or a TOML file whose `model.name` is evaluated as it is.
        args: `--split NAME` (default test), and `--section.field value` as in training.

    Raises:
        ValueError, FileNotFoundError: naming what is missing.
    """
    from flowrl_kernels.trainer import measure, report, setup
    from flowrl_kernels.trainer.evaluate import Meter, sampled
    from flowrl_kernels.trainer.metrics import print_table
    from flowrl_kernels.trainer.reward import Scorer
    from flowrl_kernels.trainer.rollout import Sampling
    from flowrl_kernels.trainer.tasks import build_task

    split = "test"
    if "--split" in args:
        at = args.index("--split")
        split = args[at + 1] if at + 1 < len(args) else ""
        args = args[:at] + args[at + 2 :]
    path = Path(source)
    newest = None
    if path.suffix == ".toml":
        config = config_file.load(path)
        if not config.model.name:
            raise ValueError("model.name: name the Hugging Face model to evaluate, or give a run folder")
    else:
        config, newest = open_run(path)
    config, world = single(config_file.override(config, args))
    task = build_task(config.task)
    if not len(task.problems(split)):
        raise ValueError(f"task.{split}: there are no problems in the {split} split")
    if newest is not None:
        tokenizer = policy.load_tokenizer(source_of(config), config.model)
        actor = restore(config, newest, world)
    else:
        tokenizer = setup.make_tokenizer(config, task)
        attention = parallel.attention_of(config.model, config.parallel, world.device)
        actor = policy.make_policy(config, world, policy.load_model(config.model.name, config.model, attention))
    stop = setup.stop_tokens(actor, tokenizer)
    sampling = Sampling(config.rollout.max_new_tokens, config.eval.temperature, stop)
    sample = measure.make_sampler(
        setup.make_engine(config, actor, world),
        setup.make_encoder(config, task, tokenizer),
        setup.make_decoder(tokenizer),
        sampling,
        world,
    )
    scorer = Scorer(config.task, task)
    at_once = max(1, config.rollout.batch // config.eval.samples)  # what the engine decodes at once
    try:
        show = Meter(f"{split} split")
        done = sampled(task, split, sample, scorer, config.eval, config.eval.seed, at_once=at_once, progress=show)
    finally:
        scorer.close()
    print_table(f"{source}, {split} split", done.figures)
    for reason, count in done.reasons.items():
        print(f"{count} responses could not be scored: {reason}")
    folder = Path(config.run.dir) / "evaluations"
    step = None if newest is None else newest.name
    print(report.write(folder, report.contents(config, source, step, split, done, actor)))
    return done.figures
