"""Rows of the usual code datasets, read as tests. Nothing is run here, and no pickle is loaded.

HumanEval, EvalPlus: `prompt`, `test`, `entry_point`. MBPP: `test_list`. APPS, TACO, DeepCoder: `input_output` or
`tests` with inputs, outputs and perhaps `fn_name`. LiveCodeBench: `public_test_cases`, `private_test_cases`.
CodeContests: `public_tests`, ... CodeForces: `official_tests`. Unit tests: `test` or `test_code` alone.
"""

from __future__ import annotations

import ast
import base64
import binascii
import json
import pickletools
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

MAX_TESTS_BYTES = 1 << 30  # of one compressed column
WANTED = (
    "test and entry_point, test_list, input_output, tests, inputs and outputs, public_test_cases, official_tests, "
    "public_tests, or test_code"
)


@dataclass(frozen=True)
class CodeTests:
    """What a program is judged by.

    kind "programs": prints outputs[i] for inputs[i] on standard input. "calls": entry_point(*inputs[i]) is
    outputs[i]. "asserts": the code in `tests` holds, where `module` is a name it may import the program by.
    prompt: code that the program goes on from, or "". seconds: for one input or call, 0 for what is left of
    the deadline. tolerance: largest relative and absolute difference of numbers that count as equal.
    """

    kind: Literal["programs", "calls", "asserts"]
    inputs: tuple[Any, ...] = ()
    outputs: tuple[Any, ...] = ()
    entry_point: str = ""
    prompt: str = ""
    tests: tuple[str, ...] = ()
    module: str = ""
    seconds: float = 0.0
    tolerance: float = 0.0
    deadline: float = 10.0
    memory: int = 1 << 30
    partial: bool = False


def read_tests(row: Mapping[str, Any], where: str, answer_key: str = "answer") -> CodeTests:
    """The tests of a row, from its own columns or from what is in the column `answer_key` (JSON or code).

    Raises ValueError naming the place and what is wrong.
    """
    try:
        fields = {**row, **_answer(_walk(row, answer_key))}
        tests = _tests(fields)
        return replace(tests, seconds=_seconds(fields.get("time_limit")), tolerance=_tolerance(fields))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{where}: {error}") from None


def _walk(row: Mapping[str, Any], key: str) -> Any:
    """A column, or the end of a dotted way into one: reward_model.ground_truth."""
    found: Any = row.get(key)
    if found is None and "." in key:
        found = row
        for part in key.split("."):
            found = found.get(part) if isinstance(found, Mapping) else None
    return found


def _answer(value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            return {"test": value} if "assert" in value else {}
    if isinstance(value, Mapping):
        return dict(value)
    return {"tests": value} if isinstance(value, list) else {}


def _tests(fields: dict[str, Any]) -> CodeTests:
    for key in ("generated_checker", "checker", "special_judge"):
        if fields.get(key):
            raise ValueError(f"{key!r} says that several outputs are right, which is not supported; leave the row out")
    if str(fields.get("input_mode") or "stdio") != "stdio":
        raise ValueError(f"input_mode must be 'stdio', got {fields['input_mode']!r}")
    if fields.get("test_list") is not None:
        setup = "\n".join(_texts(fields.get("test_setup_code")) + _texts(fields.get("test_imports")))
        return _asserts(fields, [f"{setup}\n{test}" for test in _texts(fields["test_list"])])
    if isinstance(fields.get("test"), str) and fields["test"].strip():
        return _asserts(fields, [fields["test"]])
    if fields.get("input_output") is not None:
        return _inputs_outputs({"fn_name": fields.get("fn_name"), **_object(fields["input_output"], "input_output")})
    if fields.get("public_test_cases") is not None or fields.get("private_test_cases") is not None:
        cases = _cases(fields.get("public_test_cases")) + _cases(fields.get("private_test_cases"))
        metadata = _object(fields.get("metadata") or {}, "metadata")
        return _list(cases, metadata.get("func_name") or fields.get("fn_name"))
    if fields.get("official_tests"):
        return _list(list(fields["official_tests"]), None)
    if fields.get("inputs") is not None and fields.get("outputs") is not None:
        return _inputs_outputs(fields)
    many = [fields.get(f"{kind}_tests") for kind in ("public", "private", "generated")]
    if any(many):
        read = [_object(part, "tests") for part in many if part]
        pairs = [(i, o) for part in read for i, o in zip(part["input"], part["output"])]
        return _inputs_outputs({"inputs": [i for i, _ in pairs], "outputs": [o for _, o in pairs]})
    tests = fields.get("tests", fields.get("test_code"))
    if isinstance(tests, str):
        try:
            tests = json.loads(tests)
        except ValueError:
            return _asserts(fields, [tests])
    if isinstance(tests, Mapping):
        return _inputs_outputs({"fn_name": fields.get("fn_name"), **tests})
    if isinstance(tests, list) and tests and all(isinstance(t, str) for t in tests):
        return _asserts(fields, tests)
    if isinstance(tests, list) and tests:
        return _list(tests, fields.get("fn_name"))
    raise ValueError(f"no tests in this row: wanted {WANTED}; it has {', '.join(fields) or 'nothing'}")


def _asserts(fields: dict[str, Any], tests: list[str]) -> CodeTests:
    entry = fields.get("entry_point") or ""
    if entry and not (isinstance(entry, str) and entry.isidentifier()):
        raise ValueError(f"entry_point must be a name, got {entry!r:.60}")
    for test in tests:
        try:
            tree = ast.parse(test)
        except SyntaxError as error:
            raise ValueError(f"the tests are no Python ({error}): {test.strip()[:60]!r}") from None
        kinds = (ast.Assert, ast.Raise, ast.ClassDef)
        called = "check(" in test or "assert" in test
        if not called and not any(isinstance(node, kinds) for node in ast.walk(tree)):
            raise ValueError(f"the tests check nothing: {test.strip()[:60]!r}")
    # what the program goes on from, if it is code: HumanEval's prompt is, a question in words is not
    prompts = (fields.get("prompt"), fields.get("code_prompt"))
    prompt = next((p for p in prompts if isinstance(p, str) and _defines(p, entry)), "")
    return CodeTests("asserts", entry_point=entry, prompt=prompt, tests=tuple(tests), module=fields.get("module") or "")


def _defines(prompt: str, entry: str) -> bool:
    return bool(entry and re.search(rf"^\s*def {entry}\b", prompt, re.MULTILINE))


def parses(code: str) -> bool:
    """Whether `code` of a dataset's author is Python."""
    try:
        ast.parse(code)
    except (SyntaxError, ValueError):
        return False
    return True


def _inputs_outputs(fields: Mapping[str, Any]) -> CodeTests:
    name = fields.get("fn_name")
    pairs = list(zip(_sequence(fields.get("inputs"), "inputs"), _sequence(fields.get("outputs"), "outputs")))
    if len(fields["inputs"]) != len(fields["outputs"]):
        raise ValueError(f"there are {len(fields['inputs'])} inputs for {len(fields['outputs'])} outputs")
    if name:
        return _checked("calls", [(_sequence(i, "an input of a call"), o) for i, o in pairs], str(name))
    return _checked("programs", [(_text(i), _text(o)) for i, o in pairs])


def _list(cases: list[Any], name: Any) -> CodeTests:
    """Lists of {"input", "output"}, as LiveCodeBench, DeepCoder and CodeForces have them."""
    kinds: set[bool] = set()
    pairs: list[tuple[Any, Any]] = []
    names = {str(name)} if name else set()
    for case in cases:
        if not isinstance(case, Mapping) or "input" not in case or "output" not in case:
            raise ValueError(f"a test must have 'input' and 'output', got {case!r:.80}")
        kind = case.get("testtype", case.get("type")) or ("functional" if names else "stdin")
        functional = kind in ("functional", "function_call", "function")
        if not functional and kind not in ("stdin", "stdin_stdout", "stdio"):
            raise ValueError(f"a test's type must be stdin or functional, got {kind!r:.40}")
        kinds.add(functional)
        given, wanted = case["input"], case["output"]
        if functional:
            names |= {str(case["fn_name"])} if case.get("fn_name") else set()
            if isinstance(given, str):  # one argument a line, each JSON
                given = [json.loads(line) for line in given.split("\n") if line.strip()]
                wanted = json.loads(wanted) if isinstance(wanted, str) else wanted
            pairs.append((_sequence(given, "an input of a call"), wanted))
        else:
            pairs.append((_text(given), _text(wanted)))
    if len(kinds) > 1:
        raise ValueError("a row's tests must be all of one kind, stdin or functional")
    if kinds == {True}:
        if len(names) != 1:
            raise ValueError(f"functional tests need the name of one function, got {sorted(names) or 'none'}")
        return _checked("calls", pairs, names.pop())
    return _checked("programs", pairs)


def _checked(kind: Literal["programs", "calls"], pairs: list[tuple[Any, Any]], name: str = "") -> CodeTests:
    if not pairs:
        raise ValueError("there are no tests in this row")
    if name and not name.isidentifier():
        raise ValueError(f"fn_name must be a name, got {name!r:.60}")
    return CodeTests(kind, tuple(i for i, _ in pairs), tuple(o for _, o in pairs), name)


def _cases(value: Any) -> list[Any]:
    """LiveCodeBench's test cases: JSON, or base64 of zlib of a pickle that holds nothing but a JSON text."""
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        return list(value)
    try:
        return list(json.loads(value))
    except ValueError:
        pass
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(value, validate=True), MAX_TESTS_BYTES)
        if not unpacker.eof:
            raise ValueError(f"test cases of more than {MAX_TESTS_BYTES} bytes")
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"test cases are neither JSON nor base64 of zlib: {error}") from None
    return list(json.loads(pickled_text(data)))


_TEXT = {"SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "UNICODE"}
_HARMLESS = {"PROTO", "FRAME", "MEMOIZE", "BINPUT", "LONG_BINPUT", "PUT", "STOP"}


def pickled_text(data: bytes) -> str:
    """The text in a pickle that holds one text and nothing else; it is read, not loaded.

    Raises ValueError for any other pickle: loading one runs what its author wrote.
    """
    found: list[str] = []
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name in _TEXT:
                found.append(str(argument))
            elif opcode.name not in _HARMLESS:
                raise ValueError(f"a pickle with {opcode.name} is refused, for loading it could run anything")
    except (ValueError, IndexError) as error:
        raise ValueError(f"test cases must be JSON or a pickled JSON text: {error}") from None
    if len(found) != 1:
        raise ValueError(f"test cases must be JSON or a pickle of one JSON text, not of {len(found)}")
    return found[0]


def _object(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, str):
        value = json.loads(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be an object or its JSON, got {value!r:.60}")
    return dict(value)


def _sequence(value: Any, name: str) -> list[Any]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise ValueError(f"{name} must be a list, got {value!r:.60}")
    return list(value)


def _texts(value: Any) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else [str(item) for item in value]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else "\n".join(map(str, value if isinstance(value, list) else [value]))


def _seconds(value: Any) -> float:
    """A time limit in seconds, "2 seconds" or {"seconds", "nanos"}; 0.0 where there is none."""
    if value is None or value == "":
        return 0.0
    if isinstance(value, Mapping):
        return float(value.get("seconds") or 0) + float(value.get("nanos") or 0) * 1e-9
    match = re.fullmatch(r"\s*([0-9.]+)\s*(s|sec|seconds?)?\s*", str(value))
    if match is None:
        raise ValueError(f"time_limit must be seconds, got {value!r:.60}")
    return float(match[1])


def _tolerance(fields: dict[str, Any]) -> float:
    value = next((fields[k] for k in ("tolerance", "epsilon", "atol") if fields.get(k) is not None), 0.0)
    if not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError(f"tolerance must be a number in [0, 1), got {value!r:.60}")
    return float(value)
