"""The doors that read text: the configuration as TOML and as flags, and files of prompts."""

import dataclasses
import json
import math
import tempfile
import typing
from functools import cache
from pathlib import Path

from hypothesis import strategies as st

from flowrl_kernels.trainer import config_file
from flowrl_kernels.trainer.config import Config, check
from flowrl_kernels.trainer.tasks.dataset import read_problems

from .draws import attempt

TEXTS = (
    "",
    "sums",
    "\U0001f600 ✓",
    'quo"te',
    "back\\slash",
    "tab\there",
    "line\nbreak",
    "\x7f",
    "../up",
    "nul\x00",
    "12",
)
NUMBERS = (0, 1, 2, 7, -1, 10**9, 2**70)
REALS = (0.0, 0.5, 1.0, -0.25, 1e-300, 1e300, float("inf"), float("nan"), float("-inf"))


@cache
def fields():
    out = []
    for section in dataclasses.fields(Config):
        kind = typing.get_type_hints(Config)[section.name]
        out += [(section.name, f.name, typing.get_type_hints(kind)[f.name]) for f in dataclasses.fields(kind)]
    return out


def value_of(d, kind):
    """A value, of the field's own type three times in four."""
    if d.chance(25):
        kind = d.of(int, float, str, bool, list)
    options = typing.get_args(kind)
    if typing.get_origin(kind) is typing.Literal:
        return d.of(*options)
    if options and typing.get_origin(kind) is not tuple:
        return value_of(d, next(o for o in options if o is not type(None)))
    if typing.get_origin(kind) is tuple:
        return [d.of(*REALS), d.of(*REALS)]
    return {bool: d.of(True, False), int: d.of(*NUMBERS), float: d.of(*REALS), str: d.of(*TEXTS)}.get(kind, [1, "a"])


def toml(value):
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = "".join(c if c.isprintable() and c not in '"\\' else f"\\U{ord(c):08x}" for c in value)
        return f'"{escaped}"'
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return repr(value)


def checked(config):
    check(config)
    return config


def nan_in(config):
    return [k for k, v in config_file.flat(config).items() if any(x != x for x in (v if isinstance(v, tuple) else [v]))]


def door_toml(d):
    """A file of settings: a checked configuration that survives being written, or a refusal that names a key."""
    chosen = [d.of(*fields()) for _ in range(d.int(0, 4))]
    settings = {(s, n): value_of(d, kind) for s, n, kind in chosen}
    by_section = {}
    for (section, name), value in settings.items():
        by_section.setdefault(section, []).append(f"{name} = {toml(value)}")
    text = "\n".join(f"[{section}]\n" + "\n".join(rows) for section, rows in by_section.items())
    spoiled = d.chance(15)
    if spoiled:
        text += d.of(
            "\n[run", "\nsteps = ", "\n[run]\nstepz = 3", "\n[nowhere]\nx = 1", "\nrun = 3", "\n\x00", "\n[run.more]"
        )
    d.told = text
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        file.write_text(text, encoding="utf-8")
        names = [f"{s}.{n}" for s, n, _ in fields()] + [str(file), *[f"{file}:{i}" for i in range(99)]]
        names += [s.name for s in dataclasses.fields(Config)]
        config = attempt(lambda: checked(config_file.load(file)), names)
        if config is None:
            return "refused"
        assert not spoiled, f"took a file with {text.splitlines()[-1]!r} in it"
        for (section, name), value in settings.items():
            got = getattr(getattr(config, section), name)
            want = tuple(value) if isinstance(value, list) else value
            same = got == want or repr(got) == repr(want)  # NaN is its own equal here
            assert same, f"{section}.{name}: {value!r} became {got!r}"
        assert not nan_in(config), f"NaN was taken for {nan_in(config)}"
        file.write_text(config_file.dumps(config), encoding="utf-8")
        assert config_file.load(file) == config, "what was written does not read back"
    return "agreed"


def door_flags(d):
    """Flags over the defaults: the value, or a refusal that names the flag."""
    section, name, kind = d.of(*fields())
    value = value_of(d, kind)
    flag = f"--{section}.{name}" + ("x" if d.chance(10) else "")
    words = [str(v) for v in value] if isinstance(value, list) else [str(value)]
    d.told = f"{flag} {words}"
    # a word with a dash in front may be taken for a flag of its own, and is then what is named
    names = [flag, *(repr(w) for w in words if w.startswith("-")), "unrecognized arguments"]
    config = attempt(lambda: config_file.override(Config(), [flag, *words]), names)
    if config is None:
        return "refused"
    assert not flag.endswith(name + "x"), "took an option that there is not"
    got = getattr(getattr(config, section), name)
    shown = list(got) if isinstance(got, tuple) else [got]
    for word, mine in zip(words, shown):
        same = word == str(mine) or (isinstance(mine, float) and repr(float(word)) == repr(mine))
        assert same, f"{flag} {word!r} became {mine!r}"
    return "agreed"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
ROLES = ("system", "user", "assistant", "user", "", 3)


def row_of(d):
    prompt = d.of("12=", "\U0001f600", "p\u2028q")
    if d.chance(20):
        prompt = d.of("", "  ", None, 3)
    if d.chance(30):
        turns = [{"role": d.of(*ROLES), "content": d.of("hi", "", 1)} for _ in range(d.int(0, 2))]
        prompt = d.of(turns, turns, {"role": "user"}, ["text"])
    row = {"prompt": prompt, "answer": d.of("3", 3, 2.5, ["a"], {"b": 1}, True)}
    if d.chance(10):
        row[d.of("prompt", "answer")] = None
    if d.chance(10):
        row.pop(d.of("prompt", "answer"))
    if d.chance(20):
        row[d.text()] = d.data.draw(JSON)
    return d.data.draw(JSON) if d.chance(10) else row


def means(row, system):
    """The problem of a row, or None where it has none."""
    if not isinstance(row, dict) or row.get("prompt") is None or row.get("answer") is None:
        return None
    prompt, answer = row["prompt"], row["answer"]
    if isinstance(answer, float) and not math.isfinite(answer):
        return None
    if isinstance(answer, str | list | dict) and not (answer.strip() if isinstance(answer, str) else answer):
        return None
    if isinstance(prompt, str):
        if not prompt.strip():
            return None
        user = {"role": "user", "content": prompt}
        return ([{"role": "system", "content": system}, user] if system else prompt), row["answer"]
    if not isinstance(prompt, list) or not prompt:
        return None
    if not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in prompt
    ):
        return None
    if prompt[-1]["role"] == "assistant" or not all(m["role"] in ("system", "user", "assistant") for m in prompt):
        return None
    chat = [{"role": m["role"], "content": m["content"]} for m in prompt]
    if system and chat[0]["role"] != "system":
        chat.insert(0, {"role": "system", "content": system})
    return chat, row["answer"]


def door_jsonl(d):
    """Lines of JSON: the problems they mean, or a refusal that names file and line."""
    rows = [row_of(d) for _ in range(d.int(0, 3))]
    system = d.of("", "", "be brief \U0001f600")
    lines = [json.dumps(row, ensure_ascii=d.chance(50)) for row in rows]
    for _ in range(d.int(0, 1)):
        lines.insert(d.int(0, len(lines)), d.of("", "   "))
    torn = d.chance(15)
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    if torn:
        data += d.of(b'\n{"prompt": "1"', b"\n\xff\xfe", b"\nnot json", b'\n{"prompt": "\xf0\x9f"}')
    d.told = repr(data)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.jsonl"
        file.write_bytes(data)
        names = [str(file), *[f"{file}:{i}" for i in range(9)]]
        problems = attempt(lambda: read_problems(str(file), "prompt", "answer", system), names)
    wanted = [means(json.loads(line), system) for line in lines if line.strip()]
    valid = bool(wanted) and None not in wanted and not torn
    if problems is None:
        assert not valid, "refused rows that mean something"
        return "refused"
    assert valid, "took rows that mean nothing"
    got = [(p.prompt, p.answer) for p in problems]
    assert repr(got) == repr(wanted), f"read {got!r}, wanted {wanted!r}"  # repr: NaN is its own equal there
    return "agreed"


def door_json(d):
    """A JSON array, alone or under "data": the problems it means, or a refusal that names the file."""
    rows = [row_of(d) for _ in range(d.int(0, 3))]
    under = d.chance(30) and rows and all(isinstance(row, dict) for row in rows)
    text = json.dumps({"data": rows} if under else rows, ensure_ascii=d.chance(50), indent=d.of(None, 1))
    data, torn = text.encode("utf-8", "surrogatepass"), d.chance(20)
    if torn:
        data = d.of(data[:-1], data + b"]", data + b"\xff\xfe", b"\xff\xfe" + data, data[: len(data) // 2] + b"\x00")
    d.told = repr(data)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.json"
        file.write_bytes(data)
        names = [str(file), *[f"{file}:{i}" for i in range(99)]]
        problems = attempt(lambda: read_problems(str(file), "prompt", "answer"), names)
    wanted = [means(row, "") for row in rows]
    return judged(problems, wanted, torn)


def judged(problems, wanted, torn):
    """Whole files of rows that mean something are taken as they are meant, all else is refused."""
    valid = bool(wanted) and None not in wanted and not torn
    assert (problems is not None) == valid, "taken" if problems else "refused rows that mean something"
    if valid:
        assert repr([(p.prompt, p.answer) for p in problems]) == repr(wanted)
    return "agreed" if valid else "refused"


def door_parquet(d):
    """The same from parquet, where pyarrow is installed."""
    import pyarrow
    from pyarrow import parquet

    num = d.int(0, 3)
    columns = {"prompt": [d.of("12=", "", "\U0001f600", None) for _ in range(num)]}
    answers = d.of(("3", "4", None), (3, 4, None), (2.5, float("nan"), None))
    columns["answer"] = [d.of(*answers) for _ in range(num)]
    if d.chance(15):
        columns.pop(d.of("prompt", "answer"))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "data.parquet"
        parquet.write_table(pyarrow.table(columns), file)
        torn = d.chance(10)
        if torn:
            file.write_bytes(file.read_bytes()[:20])
        problems = attempt(lambda: read_problems(str(file), "prompt", "answer"), [str(file)])
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    wanted = [means(row, "") for row in rows]
    return judged(problems, wanted, torn)


DOORS = {
    "config: TOML": door_toml,
    "config: flags": door_flags,
    "data: JSONL": door_jsonl,
    "data: JSON": door_json,
    "data: parquet": door_parquet,
}
