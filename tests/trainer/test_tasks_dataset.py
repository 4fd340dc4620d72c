import json
import time

import pytest
from math_answers import BOXED, NOT_READ, WRITTEN, box

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.tasks import build_task
from flowrl_kernels.trainer.tasks.dataset import exact_reward, math_reward, read_problems
from flowrl_kernels.trainer.tasks.notation import last_boxed


def lines(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


def test_rows_become_problems_in_order(tmp_path):
    file = lines(tmp_path / "a.jsonl", {"q": "one", "a": 1}, "", {"q": "two", "a": "2", "more": []})
    problems = read_problems(file, "q", "a")
    assert [(p.id, p.prompt, p.answer) for p in problems] == [(0, "one", 1), (1, "two", "2")]


def test_chat_prompts_and_a_system_message(tmp_path):
    chat = [{"role": "user", "content": "hi"}]
    file = lines(tmp_path / "a.jsonl", {"prompt": chat, "answer": "x"}, {"prompt": "hi", "answer": "x"})
    plain = read_problems(file, "prompt", "answer")
    assert plain[0].prompt == chat
    assert plain[1].prompt == "hi"
    told = [{"role": "system", "content": "be brief"}, *chat]
    assert [p.prompt for p in read_problems(file, "prompt", "answer", "be brief")] == [told, told]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "not JSON"),
        ("[1, 2]", "wanted an object"),
        ({"prompt": "x"}, "no 'answer' in this row .it has 'prompt'"),
        ({"prompt": "x", "answer": None}, "no 'answer'"),
        ({"prompt": "  ", "answer": 1}, "the prompt is empty"),
        ({"prompt": 3, "answer": 1}, "the prompt must be text or a list"),
        ({"prompt": [], "answer": 1}, "the prompt must be text or a list"),
        ({"prompt": [{"role": "user"}], "answer": 1}, "the prompt must be text or a list"),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(tmp_path, row, message):
    file = lines(tmp_path / "a.jsonl", {"prompt": "fine", "answer": 1}, row)
    with pytest.raises(ValueError, match=f"a.jsonl:2: {message}"):
        read_problems(file, "prompt", "answer")


def test_a_file_task_has_its_splits_and_no_warm_start(tmp_path):
    train = lines(tmp_path / "a.jsonl", {"prompt": "1+1", "answer": 2})
    task = build_task(TaskConfig(name="file", train=train))
    problem = task.problems("train")[0]
    assert task.problems("test") == []
    assert task.verify(problem, " 2\n") == 1.0
    assert task.verify(problem, "22") == 0.0
    assert task.warm_start(None, 3) is None
    assert task.correct_texts(problem) is None


def test_a_task_may_be_a_function_of_your_own():
    task = build_task(TaskConfig(name="rewards_for_tests:own_task"))
    assert task.name == "sums"
    with pytest.raises(ValueError, match=r"task\.name must be .* got 'chess'"):
        build_task(TaskConfig(name="chess"))
    with pytest.raises(ValueError, match="no_such_module"):
        build_task(TaskConfig(name="no_such_module:task"))


def test_the_last_box_wins_with_matching_braces():
    assert last_boxed(r"\boxed{1} then \boxed{\frac{1}{2}}.") == r"\frac{1}{2}"
    assert last_boxed(r"\boxed{1} then \boxed{2") == "1"
    assert last_boxed("none") is None
    assert exact_reward("", r"it is \boxed{ 42 }", 42) == 1.0
    assert exact_reward("", "it is 42", 42) == 0.0
    assert exact_reward("", "42", 42.0) == 1.0  # a table made a float of it
    assert exact_reward("", "so\n#### 18", "9 * 2 = 18\n#### 18") == 1.0
    assert exact_reward("", "18", "9 * 2 = 18\n#### 18") == 1.0
    assert exact_reward("", "#### 18", "18") == 0.0


@pytest.mark.parametrize(
    ("gold", "response", "right"), [(gold, box(inside), right) for gold, inside, right in BOXED] + WRITTEN
)
def test_answers_get_the_verdict_of_mathematics(gold, response, right):
    pytest.importorskip("math_verify")
    assert math_reward("", response, gold) == float(right)


def test_the_table_is_long_and_holds_both_verdicts_of_most_golds():
    verdicts = [right for *_, right in BOXED + WRITTEN]
    assert len(verdicts) >= 240
    assert min(verdicts.count(True), verdicts.count(False)) > 70


@pytest.mark.parametrize(("gold", "inside", "right", "why"), NOT_READ)
def test_the_known_gaps_are_still_gaps(gold, inside, right, why):
    pytest.importorskip("math_verify")
    assert math_reward("", box(inside), gold) == float(not right), f"now read: move it to BOXED ({why})"


@pytest.mark.parametrize(
    "response",
    ["(" * 20000, r"\boxed{" * 20000, r"\boxed{" + "{" * 900 + "}" * 900 + "}", r"\boxed{" + "(" * 400 + "}"]
    + [r"\boxed{1e999}", r"\boxed{" + "9" * 450 + "}", r"\boxed{" + r"\frac{1}{" * 40 + "2" + "}" * 40 + "}"]
    + ["####" * 20000, "answer is " * 10000, "\\boxed{\u0663}", "\\boxed{\x00\ud800}", r"\boxed{" + "a " * 200 + "}"]
    + [
        r"\boxed{5} " + ", " * 50000 + r"\boxed{6}",
        r"\text{" * 20000,
        r"\boxed{1" + " " * 480 + "x}",
        r"\boxed{\boxed{}}",
    ],
)
@pytest.mark.parametrize("gold", ["7", "B", "3, 4", "x+1", "yes"])
def test_hostile_responses_are_wrong_and_quick(gold, response):
    pytest.importorskip("math_verify")
    math_reward("", "1", gold)  # the imports
    start = time.perf_counter()
    assert math_reward("", response, gold) == 0.0
    assert exact_reward("", response, gold) == 0.0
    assert time.perf_counter() - start < 8.0


@pytest.mark.parametrize(
    "gold", ["", "  ", r"\frac{1}{", r"\boxed{}", "a proof that there are infinitely many primes of form 4k"]
)
def test_a_gold_that_cannot_be_read_scores_nothing_rather_than_zero(gold):
    pytest.importorskip("math_verify")
    assert math_reward("", r"\boxed{1}", gold) is None


def test_an_answer_of_another_type_is_named():
    with pytest.raises(TypeError, match="must be text or a number, got list"):
        math_reward("", "1", ["1"])


@pytest.mark.parametrize(
    ("answer", "response", "reward"),
    [
        ("42", r"so \boxed{42}", 1.0),
        (r"\frac{1}{2}", r"\boxed{0.5}", 1.0),
        (r"3\sqrt{2}", r"\boxed{3}", 0.0),
        (r"3\sqrt{2}", r"\boxed{\sqrt{18}}", 1.0),
        ("x^2+1", r"\boxed{1+x^2}", 1.0),
        (7, "I give up", 0.0),
        ("1,000", r"\boxed{1000}", 1.0),
    ],
)
def test_math_answers_are_compared_as_mathematics(answer, response, reward):
    pytest.importorskip("math_verify")
    assert math_reward("", response, answer) == reward
