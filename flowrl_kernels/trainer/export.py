"""What is done with a finished run, in one process: a Hugging Face folder, an evaluation."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from flowrl_kernels.trainer import checkpoint, config_file, measure, objective, parallel, policy, report
from flowrl_kernels.trainer.config import Config, check, listed
from flowrl_kernels.trainer.evaluate import sampled
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.parts import make_engine, make_stops, make_text, stop_tokens
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.rollout import Engine
from flowrl_kernels.trainer.tasks import build_task
from flowrl_kernels.trainer.terminal import Terminal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_run(folder: Path) -> tuple[Config, Path]:
    """A run's resolved configuration and newest checkpoint.

    Raises:
        FileNotFoundError: no run, or no checkpoint yet.
    """
    if not (folder / "config.toml").is_file():
        raise FileNotFoundError(f"{folder} holds no run (no config.toml in it)")
    newest, damaged = checkpoint.choose(folder, parallel.ALONE)
    if newest is None:
        raise FileNotFoundError(f"{folder} has no checkpoint yet")
    for path, why in damaged.items():
        print(f"checkpoint {path.name} is damaged ({why}); {newest.name} is taken", file=sys.stderr)
    config = config_file.load(folder / "config.toml")
    return dataclasses.replace(config, run=dataclasses.replace(config.run, dir=str(folder))), newest


def source_of(config: Config) -> str:
    """The folder or name that a run's model and tokenizer were read from."""
    start = Path(config.run.dir) / "start"
    return str(start) if start.exists() else config.model.name


def restore(config: Config, newest: Path, world: World) -> policy.Policy:
    """The policy of a checkpoint, whole and in one process, however many ranks wrote it."""
    folder, source = Path(config.run.dir), source_of(config)
    needs = objective.needs(config)
    model = policy.load_model(source, config.model, parallel.attention_of(config.model, config.parallel, world.device))
    adapters = config.lora.rank > 0
    actor = policy.make_policy(config, world, model, log_z=needs.log_z, value=needs.value, adapters=adapters)
    checkpoint.load_model(newest, folder, actor)
    return actor


def single(config: Config) -> Config:
    """The same run in one un-sharded float32 process, where nothing but the model asked for can run code or be asked.

    A run folder may be somebody else's: what its config.toml says about code that comes with a model is forgotten.
    """
    return dataclasses.replace(
        config,
        parallel=dataclasses.replace(config.parallel, dtype="float32", replicate=1, offload_reference=False),
        model=dataclasses.replace(config.model, trust_remote_code=False),
        # the model restored here; a server has other weights
        rollout=dataclasses.replace(config.rollout, engine="hf", overlap=0),
    )


def start(config: Config) -> World:
    """Raises ValueError for settings that one float32 process cannot follow, or under torchrun."""
    p = config.parallel
    for name, only in (("dtype", "float32"), ("replicate", 1), ("offload_reference", False)):
        if getattr(p, name) != only:
            raise ValueError(f"parallel.{name}: wanted {only!r} here (one process, float32); got {getattr(p, name)!r}")
    world = parallel.start(config.run, p)
    if world.size > 1:
        raise ValueError(f"wanted one process, without torchrun; got {world.size}")
    return world


def export_run(folder: Path, out: Path, dtype: str | None = None, args: list[str] | None = None) -> None:
    """Writes a run's newest undamaged checkpoint as a Hugging Face folder, log Z beside it in `nn.LOG_Z_FILE`.

    Args:
        dtype: "float32", "bfloat16" or "float16"; by default the run's `checkpoint.dtype`.
        args: `--section.field value` as in training.

    Raises:
        FileNotFoundError: there is no run or no checkpoint.
        ValueError: `out` exists, or every checkpoint is damaged.
    """
    config, newest = open_run(folder)
    if out.exists():
        raise ValueError(f"{out} exists already")
    config = config_file.override(single(config), args or [], "flowrl export RUN FOLDER")
    world = start(config)
    actor = restore(config, newest, world)
    tokenizer = policy.load_tokenizer(source_of(config), config.model)
    partial = out.with_name(out.name + ".incomplete")
    try:
        policy.save_folder(
            actor, tokenizer, partial, world,
            stop=stop_tokens(actor, tokenizer), dtype=dtype or config.checkpoint.dtype,
        )  # fmt: skip
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def open_source(source: str, settings: str | None) -> tuple[Config, Path | None]:
    """What `flowrl eval` is given: a run folder, a Hugging Face folder or a TOML file; and a run's checkpoint.

    settings: a TOML file with the task of a Hugging Face folder.
    """
    path = Path(source).expanduser()
    if path.suffix == ".toml":
        config = config_file.load(path)
        if not config.model.name:
            raise ValueError("model.name: name the Hugging Face model to evaluate, or give a run folder")
        return config, None
    if (path / "config.toml").is_file() or not (path / "config.json").is_file():
        if settings is not None:
            raise ValueError("--config: goes with a Hugging Face folder; a run folder has its own config.toml")
        return open_run(path)
    config = config_file.load(settings) if settings is not None else Config()
    return dataclasses.replace(config, model=dataclasses.replace(config.model, name=str(path))), None


def open_policy(config: Config, newest: Path | None, world: World) -> tuple[policy.Policy, PreTrainedTokenizerBase]:
    """The policy of a run's checkpoint, or of the Hugging Face model in the config, and its tokenizer."""
    if newest is not None:
        return restore(config, newest, world), policy.load_tokenizer(source_of(config), config.model)
    tokenizer = policy.load_tokenizer(config.model.name, config.model)
    attention = parallel.attention_of(config.model, config.parallel, world.device)
    return policy.make_policy(config, world, policy.load_model(config.model.name, config.model, attention)), tokenizer


def open_engine(config: Config, actor: policy.Policy, world: World) -> Engine:
    """The engine in the config with the policy's weights in it: vLLM's starts on random ones."""
    engine = make_engine(config, actor, world)
    engine.update_weights(policy.named_weights(actor), 0)
    return engine


def evaluate_run(
    source: str, args: list[str], split: str = "test", settings: str | None = None, out: str | None = None
) -> dict[str, float]:
    """Samples and scores a split with a run's policy, or with a Hugging Face model under a config.

    Args:
        source: a run folder, a Hugging Face folder, or a TOML file whose `model.name` is evaluated as it is.
        args: `--section.field value` as in training.
        settings: a TOML file with the task of a Hugging Face folder.
        out: a JSON file for the figures.

    Raises:
        ValueError, FileNotFoundError: naming what is missing.
    """
    config, newest = open_source(source, settings)
    run = Path(source).expanduser() if newest is not None else None
    config = config_file.expand(config_file.override(single(config), args, "flowrl eval RUN_OR_FOLDER"))
    refuse_code_of(run, config)
    world = start(config)
    check(config)
    task = build_task(config.task)
    if not len(task.problems(split)):
        raise ValueError(f"task.{split}: there are no problems in the {split} split")
    scorer = Scorer(config.task, task).first
    actor, tokenizer = open_policy(config, newest, world)
    text = make_text(config, task, tokenizer)
    sampling = measure.evaluation_sampling(config, stop_tokens(actor, text.tokenizer), make_stops(config, text))
    engine = open_engine(config, actor, world)
    sample = measure.make_sampler(engine, text, sampling, world)
    at_once = max(1, config.rollout.batch // config.eval.samples)  # what the engine decodes at once
    terminal = Terminal()
    try:
        show = partial(terminal.evaluating, split)
        done = sampled(task, split, sample, scorer, config.eval, at_once=at_once, progress=show)
    finally:
        scorer.close()
        engine.close()
    terminal.table(f"{source}, {split} split", done.figures)
    for reason, count in done.reasons.items():
        print(f"{count} responses could not be scored: {reason}")
    found = report.contents(config, source, None if newest is None else newest.name, split, done, actor)
    folder = Path(config.run.dir) / "evaluations"
    print(report.write(folder, found) if out is None else report.save(Path(out).expanduser(), found))
    return done.figures


def refuse_code_of(run: Path | None, config: Config) -> None:
    """Refuses functions out of the run folder itself: a folder from somebody else must not bring its code."""
    if run is None:
        return
    named = [("task.name", config.task.name), *(("task.reward", name) for name in listed(config.task.reward))]
    for key, name in named:
        module, colon, _ = name.partition(":")
        if not colon:
            continue
        spec = None if module.endswith(".py") else importlib.util.find_spec(module.partition(".")[0])
        places = [module] if module.endswith(".py") else []
        places += [str(spec.origin or ""), *(spec.submodule_search_locations or ())] if spec is not None else []
        for place in places:
            if place and Path(place).expanduser().resolve().is_relative_to(run.resolve()):
                raise ValueError(f"{key}: {name!r} would run {place}, which came with the run folder; move it out")
