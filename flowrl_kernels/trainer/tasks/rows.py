"""Rows of a data source, each with its place: JSON, JSONL, CSV, parquet, saved `datasets` folders, hub names.

Files are read as data only: nothing in them is ever run. `datasets` is needed for hub names alone.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

Rows = Iterator[tuple[str, Any]]
"""(place, row): "file:line" for text, "file: row n" for tables."""

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SPLIT_NAMES = ("train", "training", "valid", "validation", "val", "dev", "test", "eval")
WANTED = (
    "a .jsonl, .json, .csv, .tsv or .parquet file (text may be .gz), a folder of them or one saved by `datasets` "
    "(folder:split), or a name on the hub: org/data:split, org/data/config:split"
)
_HUB = re.compile(r"[\w.-]+(/[\w.-]+){0,2}(:[^/\\]+)?")
_JSON = json.JSONDecoder()


def rows(source: str) -> Rows:
    """Every row of `source` in order.

    What exists on disk is read from disk: a file, or FOLDER or FOLDER:SPLIT. Anything else that looks like it is a
    name on the hub, ORG/DATA[/CONFIG][:SPLIT], split "train" if none is named.

    Raises:
        FileNotFoundError: a path that is not there.
        ValueError: a malformed file, named with its line; a folder whose split is not settled; a reader that is not
            installed.
    """
    path, split = _local(source)
    if path is None:
        yield from _hub(source)
    elif path.is_dir():
        yield from _folder(path, split, source)
    else:
        yield from _file(path, split, str(source))


def files_of(source: str) -> list[Path]:
    """The files on disk that `source` is read from, sorted; [] for "" and for a name on the hub."""
    path = _local(source)[0] if source else None
    if path is None:
        return []
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _local(source: str) -> tuple[Path | None, str]:
    """The path on disk that `source` means and its split; None: a name on the hub."""
    path = Path(source).expanduser()
    head, colon, split = source.rpartition(":")
    parent = Path(head).expanduser() if colon and head and "/" not in split else None
    if path.exists():
        if parent is not None and parent.exists():
            raise ValueError(f"{source}: both {source} and {head} exist; rename one")
        return path, ""
    if parent is not None and parent.exists():
        return parent, split
    local = source.startswith((".", "/", "~")) or _kind(path) or (parent is not None and _kind(parent))
    if local or path.suffix in (".txt", ".gz", ".zip", ".zst", ".xlsx") or not _HUB.fullmatch(source):
        raise FileNotFoundError(f"{source}: no such file; wanted {WANTED}")
    return None, ""


def _kind(path: Path) -> str:
    """The suffix that says how to read a file, without .gz; "" for others."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
        if suffixes and suffixes[-1] in (".parquet", ".arrow"):
            return ""
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def _file(path: Path, split: str, name: str) -> Rows:
    kind = _kind(path)
    if split and kind != ".json":
        raise ValueError(f"{name}: a {kind or 'plain'} file has no splits; leave out {':' + split!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no such file")
    if kind in (".jsonl", ".ndjson"):
        yield from _json_lines(path, name)
    elif kind == ".json":
        yield from _json(path, split, name)
    elif kind in (".csv", ".tsv"):
        yield from _csv(path, "\t" if kind == ".tsv" else ",", name)
    elif kind == ".parquet":
        yield from _parquet(path, name)
    elif kind == ".arrow":
        yield from _arrow(path, name)
    else:
        raise ValueError(f"{name}: wanted {WANTED}")


# ------------------------------------------------------------------------------------------------ text


def _lines(path: Path, name: str) -> Iterator[tuple[int, str]]:
    """(number, text) of each line: UTF-8, with or without a byte order mark, \\n, \\r\\n or \\r."""
    number = 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as file:
            for block in file:
                for raw in block.splitlines() or [b""]:
                    number += 1
                    if number == 1:
                        if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
                            raise ValueError(f"{name}:1: UTF-16; wanted UTF-8")
                        raw = raw.removeprefix(b"\xef\xbb\xbf")
                    try:
                        yield number, raw.decode("utf-8")
                    except UnicodeDecodeError as error:
                        bad = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
                        raise ValueError(f"{name}:{number}: not UTF-8 ({bad})") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{name}:{number + 1}: broken gzip ({error})") from None


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError, ValueError) as error:  # ValueError: an int of too many digits
        raise ValueError(f"{place}: not JSON ({error!s:.100}): {text.strip()[:80]!r}") from None


def _json_lines(path: Path, name: str) -> Rows:
    for number, text in _lines(path, name):
        if text.strip():
            yield f"{name}:{number}", _parse(text, f"{name}:{number}")


def _json(path: Path, split: str, name: str) -> Rows:
    """A list of rows; an object that holds one ({"data": [...]}, or a list per split); or JSON lines."""
    text = "\n".join(line for _, line in _lines(path, name))
    start = len(text) - len(text.lstrip())
    if text[start : start + 1] == "[":
        if split:
            raise ValueError(f"{name}: holds a list, which has no split {split!r}")
        yield from _elements(text, start, name, last=True)
        return
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError, ValueError):
        whole = None  # several objects, one a line; or broken, which reading by lines names
    lists = [key for key, value in whole.items() if isinstance(value, list)] if isinstance(whole, dict) else []
    tables = [key for key in lists if all(isinstance(row, Mapping) for row in whole[key]) and whole[key]]
    if split:
        if split not in tables:
            raise ValueError(f"{name}: no list of rows {split!r} in it (it has {_named(tables)})")
        tables = [split]
    if (isinstance(whole, dict) and tables and len(tables) == len(whole)) or split:
        if len(tables) > 1:
            raise ValueError(f"{name}: several lists of rows ({_named(tables)}); choose one by {name}:{tables[0]}")
        yield from _elements(text, _list_of(text, start, tables[0]), name)
    elif tables == ["data"]:  # other keys beside it say what the data are
        yield from _elements(text, _list_of(text, start, "data"), name)
    else:
        for number, line in enumerate(text.split("\n"), start=1) if whole is None else [(1, text)]:
            if line.strip():
                yield f"{name}:{number}", _parse(line, f"{name}:{number}")


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _list_of(text: str, at: int, wanted: str) -> int:
    """Where the list of key `wanted` starts in the (valid) object that starts at `at`."""
    at = _skip(text, at + 1)
    while True:
        key, at = _JSON.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # past the colon
        if key == wanted:
            return at
        _, at = _JSON.raw_decode(text, at)
        at = _skip(text, _skip(text, at) + 1)  # past the comma


def _elements(text: str, at: int, name: str, last: bool = False) -> Rows:
    """The elements of the list that starts at `at`, each named by the line it starts on; last: nothing may follow."""
    line, counted = 1, 0
    at = _skip(text, at + 1)
    if text[at : at + 1] == "]":
        return
    while True:
        line, counted = line + text.count("\n", counted, at), at
        try:
            row, end = _JSON.raw_decode(text, at)
        except (json.JSONDecodeError, RecursionError, ValueError) as error:
            at_line = getattr(error, "lineno", line)
            raise ValueError(f"{name}:{at_line}: not JSON ({error!s:.100})") from None
        yield f"{name}:{line}", row
        at = _skip(text, end)
        if text[at : at + 1] == "]":
            if last and text[at + 1 :].strip():
                at = _skip(text, at + 1)
                raise ValueError(f"{name}:{line + text.count(chr(10), counted, at)}: something after the list's end")
            return
        if text[at : at + 1] != ",":
            raise ValueError(f"{name}:{line + text.count(chr(10), counted, at)}: not JSON (wanted , or ] in the list)")
        at = _skip(text, at + 1)


def _csv(path: Path, delimiter: str, name: str) -> Rows:
    limit = csv.field_size_limit(1 << 26)  # the default refuses a long prompt
    try:
        reader = csv.reader((text + "\n" for _, text in _lines(path, name)), delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            return
        if len(set(header)) < len(header):
            raise ValueError(f"{name}:1: a column name comes twice: {_named(header)}")
        start = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise ValueError(f"{name}:{start}: {len(cells)} cells for {len(header)} columns")
                yield f"{name}:{start}", dict(zip(header, cells))
            start = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{name}:{reader.line_num}: not CSV ({error})") from None
    finally:
        csv.field_size_limit(limit)


# ------------------------------------------------------------------------------------------------ tables


def _pyarrow(name: str, module: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{name}: needs pyarrow to be read (pip install pyarrow): {error}") from None


def _parquet(path: Path, name: str) -> Rows:
    parquet = _pyarrow(name, "pyarrow.parquet")
    try:
        file = parquet.ParquetFile(path)
        yield from _batches(file.iter_batches(), name)
        file.close()
    except (OSError, _pyarrow(name, "pyarrow").ArrowException) as error:
        raise ValueError(f"{name}: not parquet ({str(error).splitlines()[0]:.120})") from None


def _arrow(path: Path, name: str) -> Rows:
    arrow = _pyarrow(name, "pyarrow")
    try:
        with arrow.memory_map(str(path)) as file:
            yield from _batches(arrow.ipc.open_stream(file), name)
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{name}: not an arrow stream ({str(error).splitlines()[0]:.120})") from None


def _batches(batches: Iterable[Any], name: str) -> Rows:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            yield f"{name}: row {number}", row


# ------------------------------------------------------------------------------------------------ folders and the hub


def _named(names: Iterable[Any]) -> str:
    return ", ".join(repr(name) for name in names) or "none"


def _folder(path: Path, split: str, source: str) -> Rows:
    if (path / "dataset_dict.json").is_file():
        splits = json.loads((path / "dataset_dict.json").read_text(encoding="utf-8")).get("splits", [])
        if not split and len(splits) == 1:
            split = splits[0]
        if split not in splits:
            given = f"no split {split!r} in it" if split else "holds several splits"
            raise ValueError(f"{source}: {given}; choose one of {_named(splits)} as {path}:split")
        yield from _saved(path / split, source)
        return
    if (path / "state.json").is_file():
        if split:
            raise ValueError(f"{source}: holds one dataset, which has no split {split!r}")
        yield from _saved(path, source)
        return
    files = sorted(f for f in path.iterdir() if _kind(f) and f.is_file() and not f.name.startswith((".", "_")))
    if split and not any(_has_split(f, split) for f in files) and (path / split).is_dir():
        yield from _folder(path / split, "", source)
        return
    found = sorted({name for f in files for name in SPLIT_NAMES if _has_split(f, name)})
    if split:
        files = [f for f in files if _has_split(f, split)]
    elif len(found) > 1:
        raise ValueError(f"{source}: holds files of several splits; choose one of {_named(found)} as {path}:split")
    if not files:
        inside = sorted(f.name for f in path.iterdir())[:8]
        what = f"no file of split {split!r}" if split else "no data files"
        raise ValueError(f"{source}: {what} in this folder (it has {_named(inside)}); wanted {WANTED}")
    if len({_kind(f) for f in files}) > 1:
        kinds = _named(sorted({_kind(f) for f in files}))
        raise ValueError(f"{source}: files of several kinds ({kinds}); name one file, or keep one kind in a folder")
    for file in files:
        yield from _file(file, "", str(file))


def _has_split(path: Path, split: str) -> bool:
    """Whether a file's name says so: train.jsonl, train-00000-of-00002.parquet, gsm8k_test.json.gz."""
    return re.search(rf"(^|[-_. ]){re.escape(split)}([-_. ]|$)", path.name.lower()) is not None


def _saved(path: Path, source: str) -> Rows:
    """A folder by `Dataset.save_to_disk`: the arrow files that its state.json lists, in order."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source}: {path / 'state.json'} is not what `datasets` writes ({error})") from None
    if state.get("_indices_data_files") or state.get("_indices_files"):
        raise ValueError(f"{source}: saved with an index beside its rows; save it again after flatten_indices()")
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{source}: state.json names a file outside the folder: {name!r}")
        yield from _arrow(path / name, f"{source}" if len(names) == 1 else str(path / name))


def _hub(source: str) -> Rows:
    name, _, split = source.partition(":")
    parts = name.split("/")
    config = parts.pop() if len(parts) == 3 else None
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{source}: no such file or folder; a name on the hub needs `datasets` (pip install datasets): {error}"
        ) from None
    # since version 4 `datasets` runs no code that comes with data; before, this is how to say so
    options = {} if int(datasets.__version__.split(".")[0]) >= 4 else {"trust_remote_code": False}
    try:
        data = datasets.load_dataset("/".join(parts), config, split=split or "train", **options)
    except Exception as error:  # of whatever kind: the network, the hub, a config or split that is not there
        hint = "" if config else f"; a config is named as {'/'.join(parts)}/CONFIG:{split or 'train'}"
        raise ValueError(f"{source}: {type(error).__name__}: {' '.join(str(error).split()):.300}{hint}") from None
    for index, row in enumerate(data):
        yield f"{source}: row {index + 1}", row
