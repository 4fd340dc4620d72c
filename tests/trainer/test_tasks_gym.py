import json
import pickle
import string

import pytest
import tiny

from flowrl_kernels.trainer import __main__ as main
from flowrl_kernels.trainer import config_file
from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.config import Config, TaskConfig
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.tasks import build_task, char_tokenizer, gym
from flowrl_kernels.trainer.tasks.plain_reading import literal, sympy_expression

pytest.importorskip("reasoning_gym")

CHAIN = TaskConfig(name="gym:chain_sum", gym={"max_terms": 3, "max_digits": 2}, size=30, held_out=10)


def test_a_generator_gives_problems_by_seed_and_its_own_verdict():
    task = build_task(CHAIN)
    again = build_task(CHAIN)
    other = build_task(TaskConfig(name="gym:chain_sum", gym=CHAIN.gym, size=30, held_out=10, seed=1))
    questions = {split: [p.prompt for p in task.problems(split)] for split in ("train", "valid", "test")}
    assert [len(questions[s]) for s in ("train", "valid", "test")] == [30, 10, 10]
    assert questions["train"] == [p.prompt for p in again.problems("train")]
    assert set(questions["train"]) != {p.prompt for p in other.problems("train")}
    problem = task.problems("test")[0]
    total = str(eval(problem.prompt.partition(":")[2].partition("=")[0]))  # the test's own arithmetic, not a response's
    assert task.verify(problem, f"<think>7 <answer>0</answer></think> so <answer> {total} </answer>") == 1.0
    assert task.verify(problem, rf"\boxed{{{total}}}") == 1.0
    assert task.verify(problem, "<answer>-99999</answer>") < 1.0


def test_no_question_stands_in_two_splits_though_neighbouring_seeds_share_their_entries():
    small = TaskConfig(name="gym:chain_sum", gym={"max_terms": 2, "max_digits": 1}, size=200, held_out=20)
    task = build_task(small)
    splits = [[p.prompt for p in task.problems(split)] for split in ("train", "valid", "test")]
    everything = [prompt for split in splits for prompt in split]
    assert len(everything) == len(set(everything))
    assert len(splits[0]) < 200  # all that is left: there are no 240 such sums
    import reasoning_gym

    made = [reasoning_gym.create_dataset("chain_sum", seed=seed, size=3) for seed in (5, 6)]
    assert made[0][1]["question"] == made[1][0]["question"]  # why seeds of splits stand a million apart


def test_partial_credit_is_the_scorers_and_can_be_turned_off():
    task = build_task(TaskConfig(name="gym:n_queens", size=2, held_out=2))
    whole = build_task(TaskConfig(name="gym:n_queens", size=2, held_out=2, gym_partial=False))
    problem = task.problems("test")[0]
    board = problem.answer["metadata"]["valid_answers"][0]
    rows = repr([row.split() for row in board.split("\n")])
    assert task.verify(problem, board) == 1.0
    assert task.verify(problem, rows) == 0.5  # a Python list of lists
    assert not task.correct(0.5)
    assert (whole.verify(problem, board), whole.verify(problem, rows)) == (1.0, 0.0)


HARM = "__import__('pathlib').Path({!r}).write_text('seen')"


@pytest.mark.parametrize("name", sorted(gym._MENDED))
def test_no_scorer_runs_a_response(name, tmp_path):
    import reasoning_gym.factory as factory

    generator = next(n for n, (kind, _) in factory.DATASETS.items() if kind.__module__ == f"reasoning_gym.{name}")
    task = build_task(TaskConfig(name=f"gym:{generator}", size=1, held_out=2))
    # sympy cannot integrate all that is asked: such a stored answer repeats the question
    problem = next(p for p in task.problems("test") if "Integral" not in p.answer["answer"])
    assert task.verify(problem, problem.answer["answer"]) == 1.0
    mark = tmp_path / "mark"
    for code in (HARM.format(str(mark)), f"[{HARM.format(str(mark))}]", f"Symbol('x', {HARM.format(str(mark))})"):
        assert task.verify(problem, f"<answer>{code}</answer>") < 0.1
        assert not mark.exists()


def test_a_scorer_that_runs_text_and_is_not_known_is_refused_by_name(monkeypatch):
    monkeypatch.delitem(gym._MENDED, "games.puzzle24")
    with pytest.raises(ValueError, match=r"gym:puzzle24.*reasoning_gym\.games\.puzzle24 calls parse_expr"):
        build_task(TaskConfig(name="gym:puzzle24"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"name": "gym:chain_sums"}, "did you mean 'chain_sum'"),
        ({"name": "gym:composite"}, "mixes others"),
        ({"gym": {"max_term": 3}}, "chain_sum has no 'max_term'; did you mean 'max_terms'"),
        ({"gym": {"seed": 3}}, r"task\.gym\.seed: set task\.seed"),
        ({"gym": {"max_terms": 1}}, r"task\.gym: .* will not do for chain_sum"),
        ({"seed": 1000}, r"task\.seed"),
        ({"size": 0}, r"task\.size"),
        ({"gym": {"max_terms": 2, "max_digits": 1}, "held_out": 200}, r"task\.held_out: .* only \d+ questions"),
    ],
)
def test_settings_that_make_no_problems_are_refused_by_name(settings, said):
    with pytest.raises(ValueError, match=said):
        build_task(TaskConfig(**{"name": "gym:chain_sum", **settings}))


def test_an_unevaluated_integral_is_no_antiderivative():
    """The scorer's own parser takes it for one: its derivative is the integrand."""
    task = build_task(TaskConfig(name="gym:simple_integration", size=1, held_out=1))
    problem = task.problems("test")[0]
    integrand = problem.answer["metadata"]["integrand"]
    assert task.verify(problem, f"Integral({integrand}, {problem.answer['metadata']['variable']})") == 0.0
    assert task.verify(problem, problem.answer["answer"]) == 1.0


def test_its_settings_are_a_table_in_toml_and_on_the_command_line(tmp_path):
    config = config_file.override(Config(), ["--task.name", "gym:chain_sum", "--task.gym", "{ max_terms = 3 }"])
    assert config.task.gym == {"max_terms": 3}
    (tmp_path / "a.toml").write_text(config_file.dumps(config))
    assert config_file.load(tmp_path / "a.toml") == config
    with pytest.raises(ValueError, match=r"--task\.gym: wanted a table"):
        config_file.override(Config(), ["--task.gym", "max_terms=3"])


def test_responses_are_scored_in_workers_that_get_no_problems():
    task = build_task(CHAIN)
    assert len(pickle.dumps(task)) < 1000
    scorer = Scorer(CHAIN, task)
    try:
        problems = list(task.problems("test")[:3])
        right = scorer.score(problems, [f"<answer>{p.answer['answer']}</answer>" for p in problems])
    finally:
        scorer.close()
    assert right == [1.0] * 3


@pytest.mark.nightly
def test_every_generator_gives_problems_and_most_answers_of_its_own_score_full_marks():
    import reasoning_gym.factory as factory

    without = set()  # their stored answer is one of many, or none
    for name in sorted(factory.DATASETS):
        if name == "composite":
            continue
        task = build_task(TaskConfig(name=f"gym:{name}", size=2, held_out=2))
        for problem in task.problems("test"):
            pickle.dumps(problem)
            if "Integral" in str(problem.answer["answer"]):
                continue  # what sympy could not integrate
            if not task.correct(task.verify(problem, f"<answer>{problem.answer['answer']}</answer>")):
                without.add(name)
    assert without == {"boxnet", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}


@pytest.mark.nightly
def test_a_model_trains_and_is_evaluated_on_a_generator(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = char_tokenizer(string.printable)
    cfg = tiny.config(model={"context": 256})
    model = policies.build_model(cfg, tokenizer, "sdpa")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "a.toml").write_text(
        '[task]\nname = "gym:chain_sum"\nsize = 8\nheld_out = 4\nchat_template = false\n[task.gym]\nmax_terms = 2\n'
    )
    flags = [*tiny.SMALL, *tiny.flags("run.steps 1 run.dir run model.name model rollout.max_new_tokens 4")]
    assert main.cli(["train", "a.toml", *flags]) == 0
    assert main.cli(["eval", "run", "--out", "found.json"]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["settings"]["task.gym"] == {"max_terms": 2}
    assert found["figures"]["problems"] == 4


@pytest.mark.parametrize("text", ["2*(3+4)-1/2", "-x**2/3 + C", "exp(2*x)*sin(x) + log(x)", "7//2", "1.5*x", "pi*x"])
def test_formulas_are_those_of_sympys_own_parser(text):
    sympy = pytest.importorskip("sympy")
    assert sympy_expression(text) == sympy.parse_expr(text)


@pytest.mark.parametrize(
    "text", ["x.y", "x[0]", "(1).real", "'a'", "f(x)", "sin", "lambda: 1", "9**9**9**9", "1" * 3000, "[1]", "x^2", ""]
)
def test_what_is_no_formula_is_refused(text):
    with pytest.raises(ValueError):
        sympy_expression(text)


def test_a_literal_is_read_and_a_call_is_not():
    assert literal("[['a', 1], (2, None)]") == [["a", 1], (2, None)]
    for text in ("print(1)", "[x]", "1+", "'a'*9**9"):
        with pytest.raises(ValueError):
            literal(text)
