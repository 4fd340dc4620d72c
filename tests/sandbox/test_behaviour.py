"""What programs do on their tests, in the sandbox: the same label for the same outputs, right or wrong."""

import json

import pytest

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.suites import file, measures
from flowrl_kernels.trainer.suites.figures import Outcome
from flowrl_kernels.trainer.tasks import Problem, build_task
from flowrl_kernels.trainer.tasks.code import behaviour
from flowrl_kernels.trainer.tasks.code_rows import CodeTests

pytestmark = pytest.mark.usefixtures("sandbox")
ADD = CodeTests("programs", ("1 2\n", "3 4\n"), ("3\n", "7\n"), deadline=20.0)
CALLS = CodeTests("calls", ([1, 2], [3, 4]), (3, 7), entry_point="add", deadline=20.0)
ASSERTS = CodeTests("asserts", entry_point="add", tests=("def check(f):\n    assert f(1, 2) == 3\n",), deadline=20.0)


def test_printing_programs_are_told_apart_by_every_word_that_they_print():
    right = "a, b = map(int, input().split())\nprint(a + b)"
    assert behaviour(right, ADD) == behaviour("x = input().split()\nprint(sum(map(int, x)))", ADD)
    others = [right.replace("+", "*"), "print(3)", "print(7)", "raise ValueError(input())", "raise KeyError(1)"]
    seen = [behaviour(source, ADD) for source in [right, *others[:3]]]
    assert len(set(seen)) == 4
    assert behaviour(others[3], ADD) == behaviour(others[4], ADD)  # both print nothing and end with 1


def test_functions_are_told_apart_by_what_they_return_and_how_they_raise():
    programs = [
        f"def add(a, b):\n    {body}" for body in ("return a + b", "return b + a", "return a * b", "raise KeyError")
    ]
    one, same, other, raising = (behaviour(source, CALLS) for source in programs)
    assert one == same
    assert len({one, other, raising, behaviour("x = 1", CALLS), behaviour("1 / 0", CALLS)}) == 5
    one, same, other, raising = (behaviour(source, ASSERTS) for source in programs)
    assert one == same
    assert len({one, other, raising}) == 3


def test_a_suites_programs_have_forms_by_tree_among_right_ones_and_by_behaviour_among_all(tmp_path):
    row = {"prompt": "Add two numbers.", "inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7\n"]}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    cfg = TaskConfig(name="file", test=str(tmp_path / "rows.jsonl"), reward="code", reward_timeout=20.0)
    task = build_task(cfg)
    problem: Problem = task.problems("test")[0]
    texts = ["a, b = input().split()\nprint(int(a) + int(b))", "c, d = input().split()\nprint(int(c) + int(d))",
             "print(sum(map(int, input().split())))", "print(3)", "print( 3 )"]  # fmt: skip
    blocks = [f"So:\n```python\n{text}\n```" for text in texts]
    outcome = Outcome(0, "p", [True] * 3 + [False] * 2, [9] * 5, [True] * 5, blocks)
    suite = file.Suite(task=cfg, diversity=("syntax", "behaviour"))
    measure = measures.ready(suite, file.SuiteFile(), cfg, 1)
    found, labels = measures.take(measure, suite, task, [problem], [outcome], measures.Cache(file.SuiteFile()))
    tree, does = labels["syntax"][0], labels["behaviour"][0]
    assert tree[0] == tree[1] != tree[2] is not None
    assert tree[3:] == [None, None]
    assert does[0] == does[1] == does[2] != does[3] == does[4]
    assert found["diversity"]["syntax"]["distinct@4"]["value"] == pytest.approx(2 - 1 / 5)
