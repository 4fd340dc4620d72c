"""Reading, overriding, comparing and writing a configuration.

TOML in, TOML out; unknown keys are refused with the nearest known one and the line they stand on.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import difflib
import inspect
import os
import tomllib
import types
import typing
from functools import partial
from pathlib import Path
from typing import Any, Literal

import tomli_w

from flowrl_kernels.trainer import config as config_module
from flowrl_kernels.trainer.config import Config

T = typing.TypeVar("T")

# what a resumed run may change: how long it runs, what it reports, and how its work is divided, which changes
# roundings only
FREE_ON_RESUME = (
    "run.steps",
    "run.dir",
    "run.cache",
    "run.resume",
    "run.overwrite",
    "run.allow_changed",
    "run.max_bad_updates",
    "run.threads",
    "run.device",
    "rollout.batch",
    "rollout.servers",
    "rollout.kv_cache",
    "rollout.timeout",
    "rollout.retries",
    "parallel.backend",
    "parallel.replicate",
    "parallel.checkpoint_activations",
    "parallel.compile",
    "parallel.offload_reference",
    "parallel.max_tokens",
    "parallel.memory",
    "parallel.row_tokens",
    "parallel.share_prompts",
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
        return _convert(value, _one_of(kind, several=isinstance(value, list | tuple))[0], where)
    if origin is Literal:
        if value not in args:
            raise ValueError(f"{where}: wanted one of {', '.join(map(repr, args))}; got {value!r}")
        return value
    if origin is tuple:
        if args[1:] == (...,):  # any number of one type
            if not isinstance(value, list | tuple):
                raise ValueError(f"{where}: wanted a list; got {value!r}")
            return tuple(_convert(v, args[0], where) for v in value)
        if not isinstance(value, list | tuple) or len(value) != len(args):
            raise ValueError(f"{where}: wanted a list of {len(args)} values; got {value!r}")
        return tuple(_convert(v, a, where) for v, a in zip(value, args))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not (dict if origin is dict else kind):
        raise ValueError(f"{where}: wanted {'a table' if origin is dict else kind.__name__}; got {value!r}")
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
        elif (part := _table_of_tables(hints[key])) is not None:
            if not isinstance(value, dict) or not all(isinstance(inner, dict) for inner in value.values()):
                raise ValueError(f"{place(path)}: {path!r} is tables; write [{path}.NAME]")
            values[key] = {name: _build(part, inner, f"{path}.{name}.", place) for name, inner in value.items()}
        else:
            values[key] = _convert(value, hints[key], f"{place(path)}: {path}")
    try:
        return cls(**values)
    except ValueError as error:  # what a table says of itself
        raise ValueError(f"{place(prefix.rstrip('.'))}: {prefix}{error}") from None


def _table_of_tables(kind: Any) -> type | None:
    """The dataclass of `dict[str, dataclass]`; None for another type."""
    args = typing.get_args(kind)
    many = typing.get_origin(kind) is dict and len(args) == 2 and dataclasses.is_dataclass(args[1])
    return typing.cast(type, args[1]) if many else None


def _place(file: str | Path, text: str) -> typing.Callable[[str], str]:
    """Finds `file:line` of a dotted key in TOML text (the file alone where the line is not plain)."""

    def find(path: str) -> str:
        table = ""
        for number, line in enumerate(text.splitlines(), 1):
            bare = line.strip()
            if bare.startswith("["):
                table = bare.split("]")[0].strip("[ ")
                here = table
            else:
                here = f"{table}.{bare.split('=')[0].strip()}".strip(".")
            if here == path:
                return f"{file}:{number}"
        return str(file)

    return find


def _read(file: str | Path) -> tuple[dict[str, Any], typing.Callable[[str], str]]:
    path = Path(file).expanduser()
    if not path.is_file():
        raise FileNotFoundError(f"config file {path} {'is a folder' if path.is_dir() else 'does not exist'}")
    try:
        text = path.read_text(encoding="utf-8")
        return tomllib.loads(text), _place(path, text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from None


def load(file: str | Path) -> Config:
    """The configuration in a TOML file, checked; its [compare.NAME] tables are `methods`' to read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not TOML, an unknown key (with the nearest known one), a value of the wrong type or range;
            the message starts with file and line.
    """
    table, place = _read(file)
    table.pop("compare", None)
    return _build(Config, table, "", place)


def load_as(cls: type[T], file: str | Path, prepare: typing.Callable[[dict[str, Any]], dict[str, Any]]) -> T:
    """Another dataclass of tables than `Config` from a TOML file, with the checks of `load`; prepare: what becomes of
    the file's tables first.

    Raises:
        FileNotFoundError, ValueError: as `load`, with file and line.
    """
    table, place = _read(file)
    return _build(cls, prepare(table), "", place)


def methods(file: str | Path) -> dict[str, dict[str, Any]]:
    """{name: tables} of a file's [compare.NAME] tables, what each method changes in the file's own settings.

    Raises:
        FileNotFoundError, ValueError: as `load`, with file and line.
    """
    table, place = _read(file)
    out = table.get("compare", {})
    for name, part in out.items() if isinstance(out, dict) else [("", None)]:
        if not isinstance(part, dict):
            raise ValueError(f"{place('compare')}: 'compare' is tables of methods; write [compare.NAME]")
        _build(Config, part, "", partial(_within, place, f"compare.{name}."))
    return out


def _within(place: typing.Callable[[str], str], prefix: str, path: str) -> str:
    return place(prefix + path)


def make(tables: Config | dict[str, Any]) -> Config:
    """A configuration from tables as a TOML file holds them, or one made in Python, its types checked.

    Raises:
        ValueError: an unknown key (with the nearest known one) or a value of the wrong type.
    """
    if isinstance(tables, Config):
        tables = {table: {k: v for k, v in part.items() if v is not None} for table, part in _nested(tables).items()}
    return _build(Config, tables, "", _nowhere)


def _nowhere(path: str) -> str:
    return "config"


def merge(config: Config, tables: dict[str, Any]) -> Config:
    """`config` with the values of tables that `methods` has read."""
    plain = {section: {k: v for k, v in part.items() if v is not None} for section, part in _nested(config).items()}
    for section, part in tables.items():
        plain[section] |= part
    return _build(Config, plain, "", str)


def _nested(config: Config) -> dict[str, dict[str, Any]]:
    return dataclasses.asdict(config)


# ------------------------------------------------------------------------------------------------ the command line


class Parser(argparse.ArgumentParser):
    """argparse whose complaint is a ValueError of one line; no abbreviations, and the usage is not repeated."""

    def __init__(self, **options: Any):
        super().__init__(**{"allow_abbrev": False, **options})

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(f"{message} (--help lists what there is)")


def _kinds() -> dict[str, Any]:
    """{"section.field": type} of every field."""
    return {
        f"{section}.{name}": kind
        for section, table in typing.get_type_hints(Config).items()
        for name, kind in typing.get_type_hints(table).items()
    }


def _sentences() -> dict[str, str]:
    """{"section.field": its sentence}: the text under each field of config.py."""
    tables = {table.__name__: section for section, table in typing.get_type_hints(Config).items()}
    out = {}
    for node in ast.parse(inspect.getsource(config_module)).body:
        if isinstance(node, ast.ClassDef) and node.name in tables:
            for field, after in zip(node.body, node.body[1:]):
                if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr):
                    sentence = inspect.cleandoc(ast.literal_eval(after.value)).replace("\n", " ")
                    out[f"{tables[node.name]}.{ast.unparse(field.target)}"] = sentence
    return out


def _one_of(kind: Any, *, several: bool = False) -> tuple[Any, bool]:
    """The type behind `X | None`, and whether None is allowed; of `X | tuple[X, ...]` the tuple for `several`."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        args = typing.get_args(kind)
        kinds = sorted((a for a in args if a is not type(None)), key=lambda a: typing.get_origin(a) is tuple)
        return kinds[-1 if several else 0], type(None) in args
    return kind, False


def _parse(words: list[str], kind: Any, flag: str) -> Any:
    """A field's value from its words on the command line."""
    kind, optional = _one_of(kind, several=len(words) > 1)
    if optional and words == ["None"]:
        return None

    def one(word: str, kind: Any) -> Any:
        if kind is bool:
            value = {"true": True, "false": False}.get(word.lower())
            if value is None:
                raise ValueError(f"{flag}: wanted True or False; got {word!r}")
            return value
        if kind in (int, float):
            try:
                return kind(word)
            except ValueError:
                raise ValueError(f"{flag}: wanted {kind.__name__}; got {word!r}") from None
        return word

    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        if parts[1:] == (...,):
            parts = (parts[0],) * len(words)
        if len(words) != len(parts):
            raise ValueError(f"{flag}: wanted {len(parts)} values; got {' '.join(words)!r}")
        return tuple(one(word, part) for word, part in zip(words, parts))
    if typing.get_origin(kind) is dict:
        try:
            return _convert(tomllib.loads(f"x = {' '.join(words)}")["x"], kind, flag)
        except tomllib.TOMLDecodeError:
            raise ValueError(
                f"{flag}: wanted a table as TOML writes it, '{{ a = 1 }}'; got {' '.join(words)!r}"
            ) from None
    if len(words) != 1:
        raise ValueError(f"{flag}: wanted one value; got {' '.join(words) or 'none'!r}")
    return _convert(one(words[0], kind), kind, flag)


def override(config: Config, args: list[str], command: str = "flowrl train FILE.toml") -> Config:
    """`config` with `--section.field value` arguments applied; `--help` prints them all and exits.

    Raises:
        ValueError: in one line, an unknown flag (with the nearest known one) or a value of the wrong type.
    """
    kinds = _kinds()
    for arg in args:
        flag = arg.split("=")[0]
        if flag.startswith("--") and flag[2:] not in kinds and flag not in ("--", "--help"):
            near = _nearest(flag[2:], list(kinds)).replace("'", "'--", 1)
            raise ValueError(f"unknown option {flag!r}{near}")
    if not {"-h", "--help"}.isdisjoint(args):
        _help(config, kinds, command)
    parser = Parser(prog=command, add_help=False)
    for path in kinds:
        parser.add_argument(f"--{path}", dest=path, nargs="*", default=argparse.SUPPRESS)
    given = {path: _parse(words, kinds[path], f"--{path}") for path, words in vars(parser.parse_args(args)).items()}
    tables: dict[str, dict[str, Any]] = {}
    for path, value in given.items():
        section, _, name = path.partition(".")
        tables.setdefault(section, {})[name] = value
    changes = {section: dataclasses.replace(getattr(config, section), **part) for section, part in tables.items()}
    return dataclasses.replace(config, **changes)


def _help(config: Config, kinds: dict[str, Any], command: str) -> typing.NoReturn:
    sentences, values = _sentences(), flat(config)
    parser = Parser(prog=command, usage=f"{command} [--section.field value ...]", add_help=False)
    parser.add_argument("-h", "--help", action="store_true", help="show this and end")
    groups = {section: parser.add_argument_group(section) for section in typing.get_type_hints(Config)}
    for path, kind in kinds.items():
        kind, _ = _one_of(kind)
        choices = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        many = typing.get_args(kind) if typing.get_origin(kind) is tuple else ()
        wanted = "|".join(map(str, choices)) or " ".join(getattr(a, "__name__", "...") for a in many) or kind.__name__
        text = f"{sentences.get(path, '')} (now: {values[path]!r})".replace("%", "%%")
        groups[path.partition(".")[0]].add_argument(f"--{path}", metavar=wanted.upper() if not choices else wanted,
                                                    help=text)  # fmt: skip
    parser.print_help()
    raise SystemExit(0)


def expand(config: Config) -> Config:
    """`~` in every path spelt out."""

    def full(path: Any) -> Any:
        if isinstance(path, tuple):
            return tuple(map(full, path))
        return os.path.expanduser(path) if path.startswith("~") else path

    task, model = config.task, config.model
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, dir=full(config.run.dir), cache=full(config.run.cache)),
        task=dataclasses.replace(task, train=full(task.train), valid=full(task.valid), test=full(task.test)),
        model=dataclasses.replace(model, name=full(model.name)),
    )


# ------------------------------------------------------------------------------------------------ writing


def dumps(config: Config) -> str:
    """The configuration as TOML that `load` reads back to an equal one (None is left out)."""
    return tomli_w.dumps(
        {section: {k: _list(v) for k, v in part.items() if v is not None} for section, part in _nested(config).items()}
    )


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


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
