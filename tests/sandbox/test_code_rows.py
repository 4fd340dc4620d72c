import base64
import json
import pickle
import zlib

import pytest

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.tasks import build_task
from flowrl_kernels.trainer.tasks.code_rows import CodeTests, pickled_text, read_tests

STDIN = CodeTests("programs", ("1 2\n", "3 4\n"), ("3\n", "7\n"))
CALLS = CodeTests("calls", ([[1, 2]], [[3]]), (3, 3), "total")
PAIRS = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "3 4\n", "output": "7\n"}]
FUNCTIONAL = [
    {"input": "[1, 2]", "output": "3", "testtype": "functional"},
    {"input": "[3]", "output": "3", "testtype": "functional"},
]


def packed(cases, protocol=4):
    return base64.b64encode(zlib.compress(pickle.dumps(json.dumps(cases), protocol=protocol))).decode()


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"input_output": json.dumps(PAIRS)}, STDIN),  # APPS, TACO
        ({"input_output": PAIRS | {"fn_name": None}}, STDIN),
        ({"input_output": json.dumps({"fn_name": "total", "inputs": [[[1, 2]], [[3]]], "outputs": [3, 3]})}, CALLS),
        ({"tests": json.dumps(PAIRS)}, STDIN),  # DeepCoder
        ({"tests": [c | {"type": "stdin_stdout"} for c in CASES]}, STDIN),
        ({"tests": [{"input": [[1, 2]], "output": 3, "type": "function_call", "fn_name": "total"}] * 2}, None),
        ({"answer": json.dumps(PAIRS)}, STDIN),  # in the answer's column
        ({"answer": PAIRS}, STDIN),
        ({"reward_model": {"ground_truth": json.dumps(PAIRS)}}, STDIN),  # verl
        (
            {"public_test_cases": json.dumps([c | {"testtype": "stdin"} for c in CASES]), "private_test_cases": ""},
            STDIN,
        ),
        ({"public_test_cases": json.dumps(CASES[:1]), "private_test_cases": packed(CASES[1:])}, STDIN),  # LiveCodeBench
        ({"public_test_cases": json.dumps(CASES[:1]), "private_test_cases": packed(CASES[1:], 2)}, STDIN),
        ({"public_test_cases": json.dumps(FUNCTIONAL), "metadata": '{"func_name": "total"}'}, CALLS),
        ({"official_tests": CASES, "input_mode": "stdio", "generated_checker": None}, STDIN),  # CodeForces
        (
            {
                "public_tests": {"input": ["1 2\n"], "output": ["3\n"]},
                "private_tests": {"input": ["3 4\n"], "output": ["7\n"]},
            },
            STDIN,
        ),
        ({"inputs": [["1 2", ""], "3 4\n"], "outputs": ["3\n", "7\n"]}, STDIN),  # lines as a list
    ],
)
def test_the_usual_formats_are_read(row, wanted):
    tests = read_tests(row, "here", "reward_model.ground_truth" if "reward_model" in row else "answer")
    assert tests == (wanted or CodeTests("calls", ([[1, 2]], [[1, 2]]), (3, 3), "total"))


def test_functions_with_assertions_are_read():
    row = {"prompt": "def f(x):\n", "test": "def check(candidate):\n    assert candidate(1) == 1", "entry_point": "f"}
    assert read_tests(row, "") == CodeTests("asserts", entry_point="f", prompt=row["prompt"], tests=(row["test"],))
    words = read_tests(row | {"prompt": "Write f."}, "")
    assert words.prompt == ""
    mbpp = {"text": "t", "test_list": ["assert f(1) == 1", "assert f(2) == 2"], "test_setup_code": "import math"}
    assert read_tests(mbpp, "").tests == ("import math\nassert f(1) == 1", "import math\nassert f(2) == 2")
    unit = read_tests({"test_code": "from solution import f\ndef test_f():\n    assert f(1)"}, "")
    assert (unit.kind, unit.entry_point) == ("asserts", "")


@pytest.mark.parametrize(
    ("value", "seconds"), [(None, 0.0), (2.5, 2.5), ("2 seconds", 2.0), ({"seconds": 1, "nanos": 500_000_000}, 1.5)]
)
def test_time_limits_are_read(value, seconds):
    assert read_tests({"inputs": ["1"], "outputs": ["1"], "time_limit": value}, "").seconds == seconds


@pytest.mark.parametrize(
    ("row", "why"),
    [
        (
            {"prompt": "p", "solution": "s"},
            "no tests in this row: wanted test and entry_point, .* has prompt, solution",
        ),
        ({"input_output": '{"inputs": ["1"], "outputs": []}'}, "1 inputs for 0 outputs"),
        ({"input_output": '{"inputs": [], "outputs": []}'}, "no tests"),
        ({"input_output": "nonsense"}, "Expecting value"),
        ({"tests": [{"input": "1"}]}, "must have 'input' and 'output'"),
        ({"tests": [{"input": "1", "output": "1", "type": "interactive"}]}, "type must be stdin or functional"),
        ({"tests": [*CASES, *FUNCTIONAL]}, "all of one kind"),
        ({"public_test_cases": json.dumps(FUNCTIONAL), "metadata": "{}"}, "need the name of one function"),
        ({"official_tests": CASES, "generated_checker": "print(1)"}, "several outputs are right"),
        ({"official_tests": CASES, "input_mode": "file"}, "input_mode must be 'stdio'"),
        ({"test": "def check(candidate: assert", "entry_point": "f"}, "no Python"),
        ({"test": "x = 1", "entry_point": "f"}, "check nothing"),
        ({"test": "assert f(1)", "entry_point": "f x"}, "entry_point must be a name"),
        ({"inputs": ["1"], "outputs": ["1"], "time_limit": "soon"}, "time_limit must be seconds"),
        ({"inputs": ["1"], "outputs": ["1"], "tolerance": 2}, r"tolerance must be a number in \[0, 1\)"),
        ({"public_test_cases": "%%%"}, "neither JSON nor base64"),
    ],
)
def test_rows_that_make_no_tests_are_named(row, why):
    with pytest.raises(ValueError, match=f"^data.jsonl:3: .*{why}"):
        read_tests(row, "data.jsonl:3")


class Bomb:
    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("bad", [Bomb(), ["x"], {"a": "b"}, 3, b"bytes", ("a", "b")])
def test_a_pickle_of_anything_but_one_text_is_refused_and_never_loaded(bad, capsys):
    for protocol in range(5):
        with pytest.raises(ValueError, match="pickle"):
            pickled_text(pickle.dumps(bad, protocol=protocol))
    row = {"private_test_cases": base64.b64encode(zlib.compress(pickle.dumps(bad))).decode()}
    with pytest.raises(ValueError, match="here: .*pickle"):
        read_tests(row, "here")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", range(5))
@pytest.mark.parametrize("text", ["", "x" * 300, "é€\U0001f600\n\\"])
def test_a_pickled_text_is_read(protocol, text):
    data = pickle.dumps(text, protocol=protocol)
    assert pickled_text(data) == text
    with pytest.raises(ValueError, match="pickle"):
        pickled_text(data[:-2])


def test_rows_carry_the_run_s_limits_and_a_bad_one_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"question": "Add.", **PAIRS}) + "\n")
    settings = {"name": "file", "train": str(path), "prompt_key": "question", "reward": "code"}
    cfg = TaskConfig(**settings, reward_timeout=3.0, code_memory=256, code_partial=True, code_tolerance=1e-6)
    task = build_task(cfg)
    tests = task.problems("train")[0].answer
    assert (tests.deadline, tests.memory, tests.partial, tests.tolerance) == (3.0, 256 << 20, True, 1e-6)
    assert task.correct(1.0)
    assert not task.correct(0.9)  # most of the tests is not solved
    path.write_text(json.dumps({"question": "Add."}) + "\n")
    with pytest.raises(ValueError, match=r"train\.jsonl:1: no tests in this row"):
        build_task(cfg)
    for bad in ({"code_memory": 1}, {"code_tolerance": 1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            build_task(TaskConfig(**settings, **bad))
