"""The run folder: what stands in it, what may become of it, and the way back where a run cannot start after all.

`look` reads; `begin` writes, when everything else is settled; then `commit`, or `rollback`. An earlier run that is
replaced is moved aside first and deleted by `commit`. Nothing that the trainer did not write is ever deleted.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from flowrl_kernels.trainer import checkpoint, config_file, parallel
from flowrl_kernels.trainer.config import Config, listed
from flowrl_kernels.trainer.parallel import World

LOGS = ("metrics.jsonl", "samples.jsonl")
MOVING, ASIDE, DISCARDED = ".replacing", ".replaced", ".discarded"
MARK = "# The whole configuration of this run, written by flowrl.\n"
MODEL_FOLDER = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*", "vocab.*",
    "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.model", "*.log_z", "*.py",
    "processor_config.json", "files.json", "adapter",
)  # fmt: skip
# what a run writes into its folder: name -> patterns of the entries in it, None for a file
OWNED: dict[str, tuple[str, ...] | None] = {
    "config.toml": None,
    "metrics.jsonl": None,
    "samples.jsonl": None,
    "wandb_id": None,
    "checkpoints": ("step_[0-9]*",),
    "start": MODEL_FOLDER,
    "start.incomplete": MODEL_FOLDER,
    "final": MODEL_FOLDER,
    "final.incomplete": MODEL_FOLDER,
    "plots": ("*.png",),
    "tensorboard": ("events.out.tfevents.*",),
    "weights": ("version_[0-9]*",),  # on their way to servers
}


Mode = Literal["new", "replace", "resume", "restart"]  # restart: to resume, and no checkpoint yet


@dataclass(frozen=True)
class Found:
    """What a run will do with its folder."""

    mode: Mode
    checkpoint: Path | None = None
    damaged: dict[Path, str] = field(default_factory=dict)  # newer checkpoints that will not do, and why

    @property
    def step(self) -> int:
        return checkpoint.step_of(self.checkpoint) if self.checkpoint else 0

    def notes(self) -> list[str]:
        """What the log should say of it."""
        out = [f"checkpoint {path.name} is damaged ({why}): set aside" for path, why in self.damaged.items()]
        if self.mode == "resume":
            out.append(f"resumed from step {self.step}")
        if self.mode == "restart":
            out.append("no checkpoint yet, so nothing to resume: starts again from step 1, the log so far is kept")
        return out


def look(folder: Path, config: Config, world: World) -> Found:
    """What stands in the folder and whether this run may have it; changes nothing. Every rank calls it.

    Raises:
        OSError: it cannot be written to.
        ValueError: it holds another run, resuming would change what a step computes, what is to be replaced is
            needed, or every checkpoint is damaged.
        FileNotFoundError: nothing to resume.
    """
    mode = parallel.first(lambda: _mode(folder, config), world)
    if mode != "resume":
        return Found(mode)
    path, damaged = checkpoint.choose(folder, world)
    return Found("restart" if path is None else "resume", path, damaged)


def _mode(folder: Path, config: Config) -> Mode:
    _recover(folder)
    there = folder
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "no permission" if there.is_dir() else f"{there} is a file"
        raise OSError(f"run.dir: cannot write to {folder}: {why}")
    saved = folder / "config.toml"
    if config.run.resume:
        if not saved.exists():
            raise FileNotFoundError(f"run.resume: {folder} holds no run (no config.toml in it)")
        if changes := config_file.changed(config_file.expand(config_file.load(saved)), config):
            raise ValueError(f"run.resume: these fields may not change, for they say what a step computes or what "
                             f"it is measured on: {'; '.join(changes)}")  # fmt: skip
        return "resume"
    held = sorted({entry.parts[0] for entry in entries(folder)})
    if not held:
        return "new"
    if not config.run.overwrite:
        raise ValueError(f"run.dir: {folder} holds a run; use --resume, --run.overwrite True or another folder "
                         f"(there: {', '.join(held)})")  # fmt: skip
    if saved.exists() and not _written_by_a_run(saved):
        raise ValueError(f"run.overwrite: {saved} was not written by a run; move it away, a run writes its own")
    train = [("task.train", path) for path in listed(config.task.train)]
    for key, path in (("model.name", config.model.name), *train,
                      ("task.valid", config.task.valid), ("task.test", config.task.test)):  # fmt: skip
        for name in held:
            if path and Path(path).exists() and Path(path).resolve().is_relative_to((folder / name).resolve()):
                raise ValueError(f"{key}: {path} lies in {folder / name}, which run.overwrite would replace")
    return "replace"


def _written_by_a_run(saved: Path) -> bool:
    return saved.read_text(encoding="utf-8", errors="replace").startswith(MARK)


# ------------------------------------------------------------------------------------------------ writing


def begin(folder: Path, config: Config, found: Found) -> None:
    """Takes the folder and writes the resolved config into it; on rank 0, when everything else is settled."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if found.mode == "replace":
            _move(folder, folder / MOVING)
            os.rename(folder / MOVING, folder / ASIDE)
        if found.mode == "resume":
            for path in found.damaged:
                os.rename(path, path.with_name(f"{path.name}.damaged"))
            for name in LOGS:
                checkpoint.truncate(folder / name, checkpoint.log_size(found.checkpoint, name))
        plain = dataclasses.replace(config.run, resume=False, overwrite=False, allow_changed=False)
        partial = folder / "config.incomplete"
        partial.write_text(MARK + config_file.dumps(dataclasses.replace(config, run=plain)), encoding="utf-8")
        os.replace(partial, folder / "config.toml")
    except OSError as error:
        raise OSError(f"run.dir: cannot write to {folder}: {error}") from None


def commit(folder: Path) -> None:
    """The run has started: what it replaces goes. On rank 0."""
    if (folder / ASIDE).exists():
        os.rename(folder / ASIDE, folder / DISCARDED)
        remove(folder / DISCARDED)


def rollback(folder: Path, found: Found) -> None:
    """The run could not start: what it replaced comes back, what it wrote goes. On rank 0."""
    if found.mode in ("resume", "restart"):
        return
    (folder / "config.incomplete").unlink(missing_ok=True)
    if found.mode == "replace":
        _recover(folder)
    else:
        remove(folder)


def _recover(folder: Path) -> None:
    """Brings back a run whose replacement ended, by a kill say, before it had started."""
    if (folder / ASIDE).is_dir():
        _clear(folder)
        os.rename(folder / ASIDE, folder / MOVING)
    if (folder / MOVING).is_dir():
        _move(folder / MOVING, folder)
        (folder / MOVING).rmdir()
    if (folder / DISCARDED).is_dir():
        remove(folder / DISCARDED)


def entries(folder: Path) -> list[Path]:
    """What a run wrote into its folder, relative to it; what else lies there is somebody else's."""
    out = []
    for name, patterns in OWNED.items():
        path = folder / name
        if patterns is None:
            out += [Path(name)] if path.is_file() else []
        elif path.is_dir() and not path.is_symlink():
            out += [Path(name, entry.name) for entry in sorted(path.iterdir()) if _matches(entry, patterns)]
    return out


def _matches(entry: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(entry.name, pattern) for pattern in patterns)


def _move(source: Path, target: Path) -> None:
    """Moves what a run wrote; what is empty then goes."""
    target.mkdir(exist_ok=True)
    for entry in entries(source):
        (target / entry).parent.mkdir(exist_ok=True)
        os.rename(source / entry, target / entry)
    _tidy(source)


def _clear(folder: Path) -> None:
    for entry in entries(folder):
        path = folder / entry
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    _tidy(folder)


def _tidy(folder: Path) -> None:
    """Removes the folders of a run that are empty."""
    for name, patterns in OWNED.items():
        if patterns is not None and (folder / name).is_dir() and not any((folder / name).iterdir()):
            (folder / name).rmdir()


def remove(folder: Path) -> None:
    """Deletes what a run wrote into `folder`, and the folder if nothing else is in it."""
    if folder.is_dir():
        _clear(folder)
        if not any(folder.iterdir()):
            folder.rmdir()


def swap(partial: Path, final: Path) -> None:
    """Puts a model folder in the place of an older one of ours, which goes last; a stranger's files in it stay."""
    old = final.with_name(final.name + ".old")
    if final.exists():
        os.rename(final, old)
    os.rename(partial, final)
    if old.exists():
        for entry in list(old.iterdir()):
            if not _matches(entry, MODEL_FOLDER) and not (final / entry.name).exists():
                os.rename(entry, final / entry.name)
        shutil.rmtree(old)


def what_is_left(folder: Path) -> str:
    """For a run that was stopped: what a resumed one goes on from."""
    newest = checkpoint.latest(folder)
    if newest is None:
        return "no checkpoint was written, so there is nothing to resume"
    return f"--resume continues from step {checkpoint.step_of(newest)}"
