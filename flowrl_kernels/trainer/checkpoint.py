"""Distributed checkpoints that a kill cannot tear, and the way back from them.

A checkpoint is a folder `checkpoints/step_N` of the run: written beside it under `step_N.incomplete`, every file
put on the disk and hashed, renamed when whole. It is only ever read from the run's own folder, and what PyTorch
pickles in it is read with an allow-list (safe_reading.py): no file in it can run code.
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
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from flowrl_kernels.trainer import fingerprint, parallel, safe_reading
from flowrl_kernels.trainer.parallel import World, barrier, gather

COUNTS = "token_order.safetensors"


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the ones before it are untouched."""


def folder(run: Path) -> Path:
    return run / "checkpoints"


def whole(run: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    steps = {step_of(p): p for p in folder(run).glob("step_*") if p.name[5:].isdigit() and p.is_dir()}
    return [steps[step] for step in sorted(steps, reverse=True)]


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run, or None; whether its files are undamaged, `choose` says."""
    return next(iter(whole(run)), None)


def choose(run: Path, world: World) -> tuple[Path | None, dict[Path, str]]:
    """The newest checkpoint whose every file is what was written, and what is wrong with newer ones.

    Every rank calls it, reads its share of the files and gets the same answer.

    Raises:
        ValueError: there are checkpoints, and none is undamaged.
    """
    damaged: dict[Path, str] = {}
    for path in parallel.first(lambda: whole(run), world):
        wrong = gather(fingerprint.damage(path, slice(world.rank, None, world.size)), world)
        found = [w for w in wrong if w]
        if not found:
            return path, damaged
        damaged[path] = found[0]
    if damaged:
        listed = "; ".join(f"{path.name}: {why}" for path, why in damaged.items())
        raise ValueError(f"run.resume: no checkpoint in {run} is undamaged ({listed})")
    return None, {}


def save(
    run: Path, step: int, policy: nn.Module, optimizer: torch.optim.Optimizer, progress: dict[str, Any],
    world: World, keep: int, inputs: dict[str, str] | None = None, ahead: dict[str, torch.Tensor] | None = None,
    counts: torch.Tensor | None = None,
) -> Path:  # fmt: skip
    """Writes everything the next step depends on; every rank must call it.

    Args:
        progress: JSON-able facts of the loop (step, updates made, skipped).
        keep: newest checkpoints that stay.
        inputs: hashes of what the run is made from, for whoever resumes it.
        ahead: this rank's part of the batch that was sampled ahead (overlap.py).
        counts: of the tokens sampled so far, the same on every rank (token_order.py).

    Raises:
        CheckpointError: on every rank, where any rank could not write (a full disk, say). What was half
            written is removed and older checkpoints stay as they were.
    """
    final = folder(run) / f"step_{step}"
    if parallel.first(final.exists, world):
        return final  # a run that was resumed from here and has not moved
    partial = final.with_name(final.name + ".incomplete")
    error, files = "", {}
    if world.main:
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir(parents=True)
        except OSError as problem:
            error = str(problem)
    barrier(world)
    try:
        model_state, optimizer_state = get_state_dict(policy, optimizer, options=_what(policy))
        state = {"model": model_state, "optimizer": optimizer_state}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # dcp warns that one process is not distributed
            dcp.save(state, checkpoint_id=partial, no_dist=world.size == 1)
        torch.save(_rng(), partial / f"rng_{world.rank}.pt")
        if ahead:
            save_file(ahead, partial / f"ahead_{world.rank}.safetensors")
        if world.main:
            logs = {file.name: file.stat().st_size for file in run.glob("*.jsonl")}
            (partial / "progress.json").write_text(json.dumps({**progress, "logs": logs, "inputs": inputs or {}}))
        own = (f"__{world.rank}_", f"rng_{world.rank}.", f"ahead_{world.rank}.")
        mine = [f for f in partial.iterdir() if f.name.startswith(own)]
        if world.main:
            mine += [partial / ".metadata", partial / "progress.json"]
            if counts is not None:
                save_file({"counts": counts}, partial / COUNTS)
                mine.append(partial / COUNTS)
        files = fingerprint.seal(mine)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # dcp's CheckpointException is no Exception
        error = error or f"{type(problem).__name__}: {_root(problem)}"
    parts = gather((error, files), world)

    def publish() -> str:
        fingerprint.write_manifest(partial, {name: entry for _, part in parts for name, entry in part.items()})
        os.rename(partial, final)
        fingerprint.sync_folder(final.parent)
        for old in whole(run)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
        return ""

    def settle() -> str:
        failed = next((e for e, _ in parts if e), "")
        try:
            failed = failed or publish()
        except OSError as problem:
            failed = str(problem)
        if failed:
            shutil.rmtree(partial, ignore_errors=True)
        return failed

    if failed := parallel.first(settle, world):
        raise CheckpointError(f"checkpoint of step {step} was not written ({failed}); older ones are intact")
    return final


def load(path: Path, run: Path, policy: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> dict[str, Any]:
    """Restores weights, optimiser and random numbers from a checkpoint of this run; returns its `progress`.

    Raises:
        ValueError: the path does not lie in the run's own folder, or it cannot be read.
    """
    _own(path, run)
    model_state, optimizer_state = get_state_dict(policy, optimizer, options=_what(policy))
    state: dict[str, Any] = {"model": model_state, "optimizer": optimizer_state}
    _read(state, path, no_dist=world.size == 1)
    set_state_dict(
        policy, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"], options=_what(policy)
    )
    rng = path / f"rng_{world.rank}.pt"
    if rng.exists():  # more ranks than before: the new ones keep their seeds
        try:
            _set_rng(safe_reading.load_plain(rng))
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"checkpoint {path} cannot be read: {rng.name}: {error}") from None
    return facts(path)


def load_model(path: Path, run: Path, policy: nn.Module) -> None:
    """Restores the weights alone, in one process, whatever sharding wrote them: for export and evaluation."""
    _own(path, run)
    frozen = {name for name, p in policy.named_parameters(remove_duplicate=False) if not p.requires_grad}
    state = {"model": {name: tensor for name, tensor in policy.state_dict().items() if name not in frozen}}
    _read(state, path, no_dist=True)
    policy.load_state_dict(state["model"], strict=not frozen)


def _what(policy: nn.Module) -> StateDictOptions:
    """Of a policy with adapters, what is trained: the rest is the model's, which the run started from."""
    frozen = not all(p.requires_grad for p in policy.parameters())
    return StateDictOptions(ignore_frozen_params=frozen, strict=not frozen)


def _own(path: Path, run: Path) -> None:
    if not path.resolve().is_relative_to(run.resolve()):
        raise ValueError(f"checkpoint {path} is not in the run folder {run}; only a run's own checkpoints are loaded")


def _read(state: dict[str, Any], path: Path, *, no_dist: bool) -> None:
    """Fills `state` from a checkpoint without running anything that stands in it; ValueError names what is wrong."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader, planner = safe_reading.Reader(path), safe_reading.Planner()
            dcp.load(state, storage_reader=reader, planner=planner, no_dist=no_dist)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as problem:  # dcp's CheckpointException is no Exception
        raise ValueError(f"checkpoint {path} cannot be read: {_root(problem)}") from None


def facts(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself: the loop's progress, sizes of the logs, hashes of the inputs."""
    return json.loads((path / "progress.json").read_text(encoding="utf-8"))


def counts(path: Path | None) -> torch.Tensor | None:
    """[V] int64, how often each token had been sampled (token_order.py); None where that was not written."""
    file = None if path is None else path / COUNTS
    return load_file(file)["counts"] if file is not None and file.exists() else None


def log_size(path: Path | None, name: str) -> int:
    """Bytes that the run's log `name` had when a checkpoint was written; 0 without a checkpoint."""
    if path is None:
        return 0
    return int(facts(path)["logs"].get(name, 0))


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
