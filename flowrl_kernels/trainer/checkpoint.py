"""Distributed checkpoints that a kill cannot tear, and the way back from them.

A checkpoint is a folder `checkpoints/step_N` of the run: written beside it under `step_N.incomplete`, renamed
when whole. It is only ever read from the run's own folder: its metadata is pickled by PyTorch, so loading one
that somebody else made would run their code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from flowrl_kernels.trainer import parallel
from flowrl_kernels.trainer.parallel import World, barrier, gather


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


def folder(run: Path) -> Path:
    return run / "checkpoints"


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None."""
    steps = {int(p.name[5:]): p for p in folder(run).glob("step_*") if p.name[5:].isdigit() and p.is_dir()}
    return steps[max(steps)] if steps else None


def save(
    run: Path, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any],
    world: World, keep: int,
) -> Path:  # fmt: skip
    """Writes everything the next step depends on; every rank must call it.

    Args:
        progress: JSON-able facts of the loop (step, updates made, skipped).
        keep: newest checkpoints that stay.

    Raises:
        CheckpointError: on every rank, where any rank could not write (a full disk, say). What was half
            written is removed and older checkpoints stay as they were.
    """
    final = folder(run) / f"step_{step}"
    if parallel.first(final.exists, world):
        return final  # a run that was resumed from here and has not moved
    partial = final.with_name(final.name + ".incomplete")
    error = ""
    if world.main:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as problem:
            error = str(problem)
    barrier(world)
    try:
        model_state, optimizer_state = get_state_dict(policy, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dcp warns that one process is not distributed
            dcp.save(state, checkpoint_id=partial, no_dist=world.size == 1)
        torch.save(_rng(), partial / f"rng_{world.rank}.pt")
        if world.main:
            logs = {file.name: file.stat().st_size for file in run.glob("*.jsonl")}
            (partial / "progress.json").write_text(json.dumps({**progress, "logs": logs}))
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # dcp's CheckpointException is no Exception
        error = error or f"{type(problem).__name__}: {_root(problem)}"
    errors = [e for e in gather(error, world) if e]
    if errors:
        if world.main:
            shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint of step {step} was not written ({errors[0]}); older ones are intact")
    if world.main:
        os.rename(partial, final)
        whole = sorted((int(p.name[5:]), p) for p in folder(run).glob("step_*") if p.name[5:].isdigit())
        for _, old in whole[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier(world)
    return final


def load(path: Path, run: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Restores weights, optimiser and random numbers from a checkpoint of this run; returns its `progress`.

    Raises:
        ValueError: the path does not lie in the run's own folder.
    """
    if not path.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"checkpoint {path} is not in the run folder {run}; only a run's own checkpoints are loaded")
    model_state, optimizer_state = get_state_dict(policy, optimizer)
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=world.size == 1)
    set_state_dict(policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    rng = path / f"rng_{world.rank}.pt"
    if rng.exists():  # more ranks than before: the new ones keep their seeds
        _set_rng(torch.load(rng, weights_only=True))
    return json.loads((path / "progress.json").read_text())


def load_model(path: Path, run: Path, policy: nn.Module) -> None:
    """Restores the weights alone, in one process, whatever sharding wrote them: for export and evaluation."""
    if not path.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"checkpoint {path} is not in the run folder {run}; only a run's own checkpoints are loaded")
    state = {"model": policy.state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=True)
    policy.load_state_dict(state["model"])


def log_size(path: Path | None, name: str) -> int:
    """Bytes that the run's log `name` had when a checkpoint was written; 0 without a checkpoint."""
    if path is None:
        return 0
    return int(json.loads((path / "progress.json").read_text())["logs"].get(name, 0))


def truncate(file: Path, size: int) -> None:
    """Cuts a log back to the bytes it had at a checkpoint: what was written after it will be written again."""
    if file.exists() and file.stat().st_size > size:
        os.truncate(file, size)


def _root(problem: BaseException) -> str:
    """The first rank's own error out of dcp's wrapper, else the error itself."""
    failures = getattr(problem, "failures", None)
    if failures:
        inner = next(iter(failures.values()))
        return str(inner[0] if isinstance(inner, tuple) else inner)
    return str(problem) or type(problem).__name__


def _rng() -> dict[str, Any]:
    """State of every generator of this process, in types that load without unpickling code."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, internal, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def _set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
