"""Reading, overriding, comparing and writing a configuration.

TOML in, TOML out; unknown keys are refused with the nearest known one and the line they stand on.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from flowrl_kernels.trainer.config import Config

# what a resumed run may change: how long it runs, what it reports, and how its work is divided, which changes
# roundings only
FREE_ON_RESUME = (
    "run.steps",
    "run.dir",
    "run.cache",
    "run.resume",
    "run.overwrite",
    "run.max_bad_updates",
    "run.threads",
    "run.device",
    "rollout.batch",
    "parallel.backend",
    "parallel.replicate",
    "parallel.checkpoint_activations",
    "parallel.compile",
    "parallel.offload_reference",
    "parallel.max_tokens",
    "parallel.row_tokens",
    "checkpoint.",
    "eval.",
    "log.",
    "task.reward_workers",
)


def _nearest(name: str, known: list[str]) -> str:
    match = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    return f"; did you mean {match[0]!r}?" if match else ""


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`, or ValueError naming the key, the type wanted and what came."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _convert(value, next(a for a in args if a is not type(None)), where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: wanted one of {', '.join(map(repr, args))}; got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ValueError(f"{where}: wanted a list of {len(args)} values; got {value!r}")
        return tuple(_convert(v, a, where) for v, a in zip(value, args))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}: wanted {kind.__name__}; got {value!r}")
    return value


def _build(cls: type, table: dict[str, Any], prefix: str, place: typing.Callable[[str], str]) -> Any:
    hints = typing.get_type_hints(cls)
    known = [f.name for f in dataclasses.fields(cls)]
    values = {}
    for key, value in table.items():
        path = f"{prefix}{key}"
        if key not in hints:
            raise ValueError(f"{place(path)}: unknown key {path!r}{_nearest(key, known)}")
        if dataclasses.is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ValueError(f"{place(path)}: {path!r} is a table; write [{path}]")
            values[key] = _build(typing.cast(type, hints[key]), value, f"{path}.", place)
        else:
            values[key] = _convert(value, hints[key], f"{place(path)}: {path}")
    return cls(**values)


def _place(file: str | Path, text: str) -> typing.Callable[[str], str]:
    """Finds `file:line` of a dotted key in TOML text (the file alone where the line is not plain)."""

    def find(path: str) -> str:
        table, _, key = path.rpartition(".")
        current = ""
        for number, line in enumerate(text.splitlines(), 1):
            bare = line.strip()
            if bare.startswith("["):
                current = bare.split("]")[0].strip("[ ")
                if current == path:
                    return f"{file}:{number}"
            elif current == table and bare.split("=")[0].strip() == key:
                return f"{file}:{number}"
        return str(file)

    return find


def load(file: str | Path) -> Config:
    """The configuration in a TOML file, checked.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown key (with the nearest known one), a value of the wrong type or range;
            the message starts with file and line.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} does not exist")
    text = path.read_text()
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    return _build(Config, table, "", _place(path, text))


def override(config: Config, args: list[str]) -> Config:
    """`config` with `--section.field value` arguments applied; exits with the nearest flag on a bad one."""
    import tyro

    return tyro.cli(Config, default=config, args=args, config=(tyro.conf.FlagConversionOff,), prog="flowrl train FILE")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return json.dumps(value)  # a JSON string is a TOML basic string
    if isinstance(value, float):
        return ("-inf" if value < 0 else "inf") if math.isinf(value) else repr(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return str(value)


def dumps(config: Config) -> str:
    """The configuration as TOML that `load` reads back to an equal one (None is left out)."""
    lines = []
    for section in dataclasses.fields(config):
        lines.append(f"[{section.name}]")
        table = getattr(config, section.name)
        for entry in dataclasses.fields(table):
            if (value := getattr(table, entry.name)) is not None:
                lines.append(f"{entry.name} = {_toml(value)}")
        lines.append("")
    return "\n".join(lines)


def flat(config: Config) -> dict[str, Any]:
    """`{"section.field": value}` of every field."""
    return {f"{s}.{k}": v for s, table in dataclasses.asdict(config).items() for k, v in table.items()}


def changed(old: Config, new: Config) -> list[str]:
    """The fields that differ and that a resumed run may not change, as `path: old -> new`."""
    before, after = flat(old), flat(new)
    falling = old.optim.schedule != "constant"  # then the rate depends on the number of steps
    return [
        f"{path}: {before[path]!r} -> {after[path]!r}"
        for path in before
        if before[path] != after[path] and (not path.startswith(FREE_ON_RESUME) or (falling and path == "run.steps"))
    ]
