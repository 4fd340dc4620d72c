"""Hashes by which a run knows again what it was made from: files, a model's folder, a task's data and its code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from flowrl_kernels.trainer.tasks.base import SPLITS, Task

MANIFEST = "files.json"
MODEL_FILES = {".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt", ".jinja", ".py"}
_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def of_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of(parts: Any) -> str:
    """Hash of plain data; objects count by their fields, or by their repr without addresses."""
    text = json.dumps(parts, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, *(getattr(value, f.name) for f in dataclasses.fields(value))]
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if hasattr(value, "tolist"):
        return value.tolist()
    return _ADDRESS.sub("", repr(value))


# ------------------------------------------------------------------------------------------------ folders


def seal(files: Iterable[Path]) -> dict[str, list[Any]]:
    """{name: [bytes, sha256]} of files, each of which is on the disk when this returns."""
    out = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())
        out[path.name] = [path.stat().st_size, of_file(path)]
    return out


def sync_folder(folder: Path) -> None:
    """Puts a folder's entries, a rename say, on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_manifest(folder: Path, files: dict[str, list[Any]]) -> None:
    """Writes what a folder should hold; the last file into it."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(files, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def damage(folder: Path, share: slice = slice(None)) -> str | None:
    """What is wrong with a folder against its manifest, or None; `share` picks the files this rank reads."""
    try:
        wanted = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, (size, digest) in sorted(wanted.items())[share]:
            path = folder / name
            if path.name != name or not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
            if of_file(path) != digest:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{MANIFEST} is missing" if isinstance(error, FileNotFoundError) else str(error)
    except (ValueError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def of_model(source: str) -> str:
    """Hash of a model folder's files; of the name where it is no folder here. Reads every weight once."""
    folder = Path(source)
    if not folder.is_dir():
        return of(source)
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.suffix in MODEL_FILES]
    return of([(path.name, of_file(path)) for path in files if path.name != MANIFEST])


# ------------------------------------------------------------------------------------------------ tasks


def of_data(task: Task) -> str:
    """Hash of every problem of every split."""
    return of([[split, [(p.id, p.prompt, p.answer) for p in task.problems(split)]] for split in SPLITS])


def of_code(task: Task, names: Iterable[str] = (), *, ours: bool = False) -> str:
    """Hash of the source files that define a task and the functions called `module:function` in `names`.

    A file counts with those of its own folder that it takes something from. `ours`: also this library's.
    """
    modules = {kind.__module__ for kind in type(task).__mro__}
    modules |= {name.partition(":")[0] for name in names if ":" in name}
    files: set[Path] = set()
    for name in modules:
        if name in sys.modules and (ours or name.partition(".")[0] != "flowrl_kernels"):
            files |= _sources(sys.modules[name])
    return of(sorted(map(of_file, files)))


def _sources(module: ModuleType) -> set[Path]:
    origin = getattr(module, "__file__", None)
    if not origin or origin.startswith(sysconfig.get_path("stdlib")) or not Path(origin).is_file():
        return set()
    home, found = Path(origin).parent, {Path(origin)}
    for value in list(vars(module).values()):
        other = value if isinstance(value, ModuleType) else sys.modules.get(str(getattr(value, "__module__", "")))
        path = getattr(other, "__file__", None)
        if path and Path(path).parent == home and Path(path).is_file():
            found.add(Path(path))
    return found
