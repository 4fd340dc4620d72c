from fractions import Fraction

import numpy as np
import pytest

from flowrl_kernels.trainer.tasks.base import Problem
from flowrl_kernels.trainer.tasks.countdown import Countdown, countdown_reward
from flowrl_kernels.trainer.tasks.expressions import chains, expressions, parse, read_chain, written


@pytest.fixture(scope="module")
def task():
    return Countdown()


def problem(numbers, target):
    return Problem(0, "", {"numbers": numbers, "target": target})


def canonical(text):
    return parse(text)[0].text


@pytest.mark.parametrize(
    "same",
    [
        ["2+3+1", "3+(1+2)", "(2)+1+3"],
        ["6/(3/2)", "6*2/3", "2*(6/3)", "(2/3)*6"],
        ["5-(2-1)", "1+5-2", "(5+1)-2", "5-2+1"],
        ["(1+2)*3", "3*(2+1)"],
        ["2*3+4*5", "5*4+3*2"],
    ],
)
def test_commuted_and_regrouped_expressions_are_one_solution(same):
    assert len({canonical(text) for text in same}) == 1


@pytest.mark.parametrize(("one", "other"), [("2*3", "2+3"), ("8/2*1", "8/2/1"), ("(1+2)*3", "1+2*3"), ("3-1", "1-3")])
def test_different_expressions_stay_different(one, other):
    assert canonical(one) != canonical(other)


@pytest.mark.parametrize(
    "text",
    ["", "+", "1+", "-1", "1 2", "(1", "1)", "()", "1**2", "1//2", "2^3", "1/0", "1/(2-2)", "a+1", "1.5+1"]
    + ["__import__('os')", "1e5", "2+\n", "٣+1", "(" * 60 + "1" + ")" * 60, "1234567890+1"],
)
def test_the_parser_refuses_what_is_not_plain_arithmetic(text):
    assert parse(text) is None


def test_the_parser_agrees_with_exact_arithmetic_on_every_written_answer():
    for text, solution in written((2, 3, 4)):
        value, numbers = parse(text)
        assert value == solution
        assert sorted(numbers) == [2, 3, 4]
        # digits and operators that this test wrote itself
        exact = "".join(f"Fraction({c})" if c.isdigit() else c for c in text)
        assert eval(exact, {"Fraction": Fraction}) == value.value


def test_canonical_texts_parse_back_to_themselves():
    for solution in expressions((1, 2, 3, 4), False):
        assert canonical(solution.text) == solution.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "2*6=12",  # 3 is left over
        "2*6=12,3+12=14",
        "2*6=13,3+13=15",
        "2*6=12,12+12=15",
        "2*6=12,3+12=15,",
        "2*6=12, 3+12=15",
        "2*6=012,3+12=15",
        "3-6=-3,2+3=5",
        "6+9=15,2+3=5",
        "2*6=12,3+12=15=15",
        "3/2=1,6+1=7",  # not exact
    ],
)
def test_a_chain_with_any_false_step_is_wrong(task, text):
    assert task.verify(problem([2, 3, 6], 15), text) == 0.0
    assert task.canonical(problem([2, 3, 6], 15), text) is None


def test_a_chain_is_right_whatever_the_order_of_its_operands(task):
    asked = problem([2, 3, 6], 15)
    keys = {task.canonical(asked, text) for text in ["2*6=12,3+12=15", "6*2=12,12+3=15"]}
    assert keys == {"2*6+3"}
    assert task.verify(problem([2, 3, 6], 16), "2*6=12,3+12=15") == 0.0


def test_the_listed_texts_are_exactly_the_accepted_chains(task):
    for asked in task.problems("test")[:25]:
        numbers, target = asked.answer["numbers"], asked.answer["target"]
        listed = task.correct_texts(asked)
        accepted = {text for text in chains(numbers) if task.verify(asked, text)}
        assert accepted == {text for text, _ in listed}
        assert all(text.endswith(f"={target}") for text in accepted)
        assert {key for _, key in listed} == set(task.solutions(asked))
        assert all(task.canonical(asked, text) == key for text, key in listed)
        assert max(len(text) for text in accepted) + 1 <= task.max_response_tokens
        assert len(asked.prompt) <= task.max_prompt_tokens


def test_four_numbers_keep_their_listing_and_bounds():
    task = Countdown(numbers=4, largest=6, max_target=20)
    for asked in task.problems("test")[:6]:
        listed = task.correct_texts(asked)
        assert {key for _, key in listed} == set(task.solutions(asked))
        assert all(task.verify(asked, text) for text, _ in listed)
        assert max(len(text) for text, _ in listed) + 1 <= task.max_response_tokens


def what(asked):
    return (*asked.answer["numbers"], asked.answer["target"])


def test_splits_are_disjoint_and_fixed_by_the_seed(task):
    splits = {s: {what(p) for p in task.problems(s)} for s in ("train", "valid", "test")}
    assert sum(map(len, splits.values())) == 1553 == len(set.union(*splits.values()))
    assert len(splits["valid"]) == len(splits["test"]) == len(task.problems("test")) == 200
    assert [p.prompt for p in Countdown().problems("test")] == [p.prompt for p in task.problems("test")]
    assert {what(p) for p in Countdown(seed=1).problems("test")} != splits["test"]


def test_prompts_give_the_numbers_in_rising_order(task):
    for split in ("train", "valid", "test"):
        for asked in task.problems(split):
            given, _, target = asked.prompt.rstrip(":").partition("=")
            assert list(map(int, given.split(","))) == sorted(asked.answer["numbers"])
            assert int(target) == asked.answer["target"]


def test_the_warm_start_never_shows_a_held_out_problem(task):
    held_out = {what(p) for split in ("valid", "test") for p in task.problems(split)}
    pairs = task.warm_start(np.random.default_rng(0), 80_000)
    shown = {what(asked) for asked, _ in pairs}
    assert not shown & held_out
    assert shown == {what(p) for p in task.problems("train")}  # so many draws do reach all of train
    assert all(task.verify(asked, text) == 1.0 for asked, text in pairs[:500])


def test_a_least_number_of_solutions_is_kept():
    task = Countdown(min_solutions=3, held_out=20)
    assert all(len(task.solutions(p)) >= 3 for split in ("train", "valid", "test") for p in task.problems(split))


def test_infix_answers_are_an_option():
    task = Countdown(answer="infix")
    asked = problem([2, 3, 6], 15)
    assert task.verify(asked, "6*2+3") == task.verify(asked, "3 + (6*2)") == 1.0
    assert task.canonical(asked, "3+(6*2)") == "2*6+3"
    assert task.verify(asked, "6*2+3+0") == task.verify(asked, "15") == task.verify(asked, "6*3-3") == 0.0
    assert task.correct_texts(asked) is None  # parentheses without end
    for example, text in task.warm_start(np.random.default_rng(0), 300):
        assert task.verify(example, text) == 1.0
        assert task.canonical(example, text) in task.solutions(example)
        assert len(text) + 1 <= task.max_response_tokens


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"numbers": 5}, "task.numbers"),
        ({"answer": "words"}, "task.answer"),
        ({"held_out": 0}, "task.held_out"),
        ({"largest": 100}, "task.largest"),
    ],
)
def test_bad_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named):
        Countdown(**settings)


def test_a_split_that_leaves_nothing_to_train_on_is_refused():
    with pytest.raises(ValueError, match="there are 1553 problems"):
        Countdown(held_out=800).problems("train")


def test_language_model_answers_are_taken_from_their_tag_or_last_line():
    wanted = {"numbers": [2, 3, 6], "target": 15}
    assert countdown_reward("", "so <answer>1</answer> no: <answer> 2*6 + 3 </answer>", wanted) == 1.0
    assert countdown_reward("", "2*6 is 12\n(2*6)+3 = 15", '{"numbers": [2, 3, 6], "target": 15}') == 1.0
    assert countdown_reward("", "2*6+3 = 16", wanted) == 0.0
    assert countdown_reward("", "", wanted) == 0.0
    with pytest.raises(ValueError, match="numbers"):
        countdown_reward("", "1", "15")


def test_a_chain_reader_takes_a_repeated_value_once():
    assert read_chain("2+2=4,4-4=0", [2, 2, 4]).value == 0
    assert read_chain("4-4=0,2+2=4", [2, 2, 4]) is None
