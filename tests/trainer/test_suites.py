"""`flowrl eval --suite`: several tasks in one table, written problem by problem, resumed, compared."""

import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

from flowrl_kernels.trainer import __main__ as main
from flowrl_kernels.trainer import policy
from flowrl_kernels.trainer.suites import contrast, file, run
from flowrl_kernels.trainer.suites.figures import Outcome, estimate, figures, paired, sampling_error, t_quantile
from flowrl_kernels.trainer.tasks import char_tokenizer

SUITES = """
samples = 4
temperature = 1.0
top_p = 1.0
max_new_tokens = 3
task = { name = "file", reward = "exact", chat_template = false }

[suite.digits]
expect = 5
task = { test = "digits.jsonl" }

[suite.greedy]
greedy = true
seed = 7
task = { test = "more.jsonl" }
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two folders with the same shape and other weights."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        actor = policy.make_policy(tiny.config(), tiny.ALONE, tiny.model())
        with torch.no_grad():
            for parameter in actor.model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        policy.save_folder(actor, char_tokenizer(tiny.ALPHABET), folder / name, tiny.ALONE)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i}+0=", "answer": str(i)} for i in range(5)]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "more.jsonl").write_text(json.dumps({"prompt": "11=", "answer": "2"}) + "\n")
    (tmp_path / "suites.toml").write_text(SUITES)
    return tmp_path


def evaluate(model, out, *more, suites="suites.toml"):
    return main.cli(["eval", str(model), "--suite", suites, "--out", str(out), "--rollout.batch", "8", *more])


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_suite_file_gives_one_table_and_all_that_repeats_it(models, place, capsys):
    assert evaluate(models / "a", "out") == 0
    printed = capsys.readouterr().out
    assert "digits" in printed
    assert "mean of the suites" in printed
    found = json.loads((place / "out" / "results.json").read_text())
    digits, greedy = found["suites"]["digits"], found["suites"]["greedy"]
    assert digits["key"]["settings"]["eval.temperature"] == 1.0
    assert digits["key"]["files"].keys() == {"digits.jsonl"}
    assert digits["key"]["weights"] == found["model"]["weights"]
    assert found["versions"]["torch"]
    assert greedy["key"]["settings"]["eval.samples"] == 1
    assert greedy["key"]["settings"]["eval.temperature"] == 0.0
    rows = lines(place / "out" / "digits.jsonl")
    assert [len(row["responses"]) for row in rows] == [4] * 5
    assert rows[3]["prompt"] == "3+0="
    assert digits["figures"]["avg@4"] == pytest.approx(np.mean([row["correct"] for row in rows]))
    assert digits["figures"]["length"] == pytest.approx(np.mean([row["tokens"] for row in rows]))
    assert digits["figures"]["truncated"] == pytest.approx(1 - np.mean([row["finished"] for row in rows]))


def test_what_is_done_is_not_done_again_and_what_was_broken_off_goes_on_with_the_same_bits(models, place, monkeypatch):
    assert evaluate(models / "a", "whole") == 0
    score, calls = run.score, []

    def broken(*args):
        calls.append(args[2])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(*args)

    monkeypatch.setattr(run, "score", broken)
    assert evaluate(models / "a", "parts") == 130
    begun = place / "parts" / "digits.jsonl.partial"
    row = begun.read_text().splitlines()[1]  # a part of which one row got written, and half of the next
    begun.write_text(begun.read_text() + row + '\n{"id": 4, "torn')
    calls.clear()
    monkeypatch.setattr(run, "score", lambda *args: calls.append(args[2]) or score(*args))
    assert evaluate(models / "a", "parts") == 0
    assert [len(part) for part in calls] == [1, 1]  # the last part of digits, and greedy
    for name in ("digits.jsonl", "greedy.jsonl"):
        assert (place / "parts" / name).read_bytes() == (place / "whole" / name).read_bytes()
    assert evaluate(models / "a", "parts") == 0
    assert len(calls) == 2


def test_another_model_or_setting_in_the_same_folder_is_refused_by_name_unless_it_may_be_replaced(
    models, place, capsys
):
    assert evaluate(models / "a", "out") == 0
    assert evaluate(models / "b", "out") == 2
    assert "different weights" in capsys.readouterr().err
    assert evaluate(models / "a", "out", "--eval.seed", "5") == 2
    assert "different eval.seed" in capsys.readouterr().err
    assert evaluate(models / "b", "out", "--overwrite") == 0
    (place / "other.toml").write_text(SUITES.replace("suite.digits", "suite.figures"))
    assert evaluate(models / "a", "out", "--overwrite", suites="other.toml") == 0
    found = json.loads((place / "out" / "results.json").read_text())
    assert found["suites"].keys() == {"figures", "greedy"}  # digits was of the other model


def test_a_server_samples_with_the_weights_of_the_model_that_is_evaluated(models, place):
    from fake_vllm import FakeVLLM

    fake = FakeVLLM(tiny.config(), char_tokenizer(tiny.ALPHABET))  # begins with other weights
    try:
        (place / "s.toml").write_text(SUITES.replace("[suite.digits]", "[suite.digits]\ngreedy = true"))
        engine = ["--rollout.engine", "server", "--rollout.servers", fake.address]
        assert evaluate(models / "a", "served", *engine, suites="s.toml") == 0
        assert evaluate(models / "a", "here", suites="s.toml") == 0
    finally:
        fake.kill()
    served, here = (lines(place / name / "digits.jsonl") for name in ("served", "here"))
    assert served == here
    assert len({row["responses"][0] for row in here}) > 1
    assert sorted(path.name for path in (place / "served").iterdir()) == [
        "digits.forms.json", "digits.jsonl", "greedy.forms.json", "greedy.jsonl", "results.json"
    ]  # fmt: skip


BAD = [
    ("[suite.x]\nexpect = 4\ntask = {name = 'file', test = 'digits.jsonl'}", "suite.x: expect: wanted 4 problems"),
    ("[suite.x]\nsample = 4", "suites.toml:2: unknown key 'suite.x.sample'; did you mean 'samples'"),
    ("samples = 4", "no suite in it"),
    ("[suite]\nx = 3", "write [suite.NAME]"),
    ("[suite.x]\ntask = {name = 'file', test = 'none.jsonl'}", "suite.x: task.test: none.jsonl"),
    ("[suite.'a b']\n", "wanted a name of letters"),
    ("[suite.x]\ndiversity = ['judge']", "'judge' wants an address"),
    ("[suite.x]\ndiversity = ['colour']", "wanted one of 'canonical'"),
    ("[suite.x]\nrating = 'r'\npercentile = {file = 'f.csv'}", "wanted both a file and the source"),
    ("[suite.x]\nmax_new_tokens = 70\ntask = {name = 'file', test = 'digits.jsonl', chat_template = false}",
     "suite.x.max_new_tokens: the prompt of problem 0"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "said"), BAD, ids=range(len(BAD)))
def test_a_suite_that_cannot_be_evaluated_is_refused_before_anything_is_sampled(models, place, capsys, text, said):
    (place / "suites.toml").write_text(text)
    assert evaluate(models / "a", "out") == 2
    assert said in capsys.readouterr().err
    assert not (place / "out").exists()


def test_two_results_are_compared_problem_by_problem_and_other_problems_are_refused(models, place, capsys):
    for name in ("a", "b"):
        assert evaluate(models / name, name) == 0
    assert main.cli(["eval", "--compare", "a", "b", "--out", "d.json"]) == 0
    found = json.loads((place / "d.json").read_text())["suites"]["digits"]
    rates = [[np.mean(row["correct"]) for row in lines(place / name / "digits.jsonl")] for name in ("a", "b")]
    assert found["avg"]["mean"] == pytest.approx(np.mean(rates[1]) - np.mean(rates[0]))
    assert found.keys() == {"avg", "pass@2", "pass@4"}
    assert "evaluated with" not in capsys.readouterr().out
    assert evaluate(models / "b", "seed", "--eval.seed", "3") == 0
    assert main.cli(["eval", "--compare", "a", "seed"]) == 0
    assert "digits: the two were evaluated with different eval.seed" in capsys.readouterr().out
    (place / "digits.jsonl").write_text((place / "digits.jsonl").read_text().replace('"4+0="', '"4+0+0="'))
    assert evaluate(models / "b", "c") == 0
    assert main.cli(["eval", "--compare", "a", "c"]) == 2
    assert "1 of 5 are only in a" in capsys.readouterr().err
    with (place / "b" / "digits.jsonl").open("a") as out:
        out.write("\n")
    with pytest.raises(ValueError, match="not what"):
        contrast.differences(place / "a", place / "b")


# ------------------------------------------------------------------------------------------------ the numbers


def outcome(correct, i=0):
    return Outcome(i, str(i), correct, [5] * len(correct), [True] * len(correct), [""] * len(correct))


ROWS = [[True] * 3 + [False] * 5, [False] * 8, [True] * 8, [True] + [False] * 7, [True, False] * 4]


def test_pass_at_k_and_its_error_are_those_of_all_subsets_and_of_the_jackknife_over_problems():
    found = figures([outcome(row, i) for i, row in enumerate(ROWS)], 8)
    for k in (1, 2, 4, 8):
        each = [statistics.mean(any(s) for s in itertools.combinations(row, k)) for row in ROWS]
        assert found[f"pass@{k}"] == pytest.approx(statistics.mean(each))
        left = [statistics.mean(each[:i] + each[i + 1 :]) for i in range(len(each))]
        jackknife = math.sqrt((len(left) - 1) / len(left) * sum((x - statistics.mean(left)) ** 2 for x in left))
        assert found[f"pass@{k}_se"] == pytest.approx(jackknife)
    assert found["avg@8"] == pytest.approx(np.mean(ROWS))
    assert found["avg@8_se"] == found["pass@1_se"]
    flat = np.std(np.ravel(ROWS), ddof=1) / math.sqrt(40)
    assert found["avg@8_se"] > 1.5 * flat  # samples of one problem are no independent trials


def test_the_sampling_error_is_what_drawing_the_same_problems_again_scatters_by():
    chances = np.array([0.1, 0.5, 0.9, 0.3])
    rng = np.random.default_rng(0)
    drawn = rng.random((4000, 4, 6)) < chances[:, None]
    scatter = drawn.mean(2).mean(1).std()
    told = [sampling_error([outcome(list(map(bool, row))) for row in rows]) ** 2 for rows in drawn[:1000]]
    assert math.sqrt(np.mean(told)) == pytest.approx(scatter, rel=0.03)


def test_unscorable_responses_are_left_out_of_a_problems_n():
    found = figures([outcome([True, None, False, False]), outcome([None] * 4), outcome([True] * 4)], 4)
    assert found["avg@4"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["problems"] == 2
    assert found["unscorable"] == pytest.approx(5 / 12)
    assert "pass@2" in found
    assert "pass@4" not in found
    assert math.isnan(estimate([1.0]).se)
    assert math.isnan(estimate([]).mean)


def test_students_quantiles_are_those_of_the_tables():
    for freedom, wanted in ((1, 12.7062), (4, 2.7764), (29, 2.0452), (499, 1.9647)):
        assert t_quantile(0.975, freedom) == pytest.approx(wanted, abs=1e-4)


def test_the_paired_interval_covers_the_true_difference_as_often_as_it_says_and_is_tighter_than_two_apart():
    rng = np.random.default_rng(1)
    hits, tighter = 0, 0
    for _ in range(400):
        chance = rng.random(12)
        a, b = (rng.binomial(8, chance * factor) / 8 for factor in (0.5, 0.6))
        found = paired(list(a), list(b))
        hits += found.low <= 0.05 <= found.high  # E[chance] * .1
        tighter += found.se < math.hypot(estimate(list(a)).se, estimate(list(b)).se)
    assert 0.92 <= hits / 400 <= 0.98
    assert tighter > 380
    with pytest.raises(ValueError, match="same problems"):
        paired([1.0], [])


def test_the_shipped_suites_are_the_papers_with_its_settings():
    shipped = file.load(Path(file.__file__).parents[3] / "configs" / "suites" / "maths.toml").suite
    assert [suite.expect for suite in shipped.values()] == [30, 30, 40, 500, 272, 674]
    assert all(suite.task.name == "maths" for suite in shipped.values())
    assert {(s.samples, s.temperature, s.top_p, s.max_new_tokens) for s in shipped.values()} == {(16, 0.6, 0.95, 8192)}


def test_a_suite_takes_what_stands_above_it_unless_it_says_otherwise(place):
    suites = file.load(place / "suites.toml").suite
    assert suites["digits"].samples == 4
    assert suites["digits"].task.reward == "exact"
    assert suites["greedy"].seed == 7
    assert file.Suite().temperature == 0.6
    assert file.Suite().top_p == 0.95


def test_measures_are_taken_again_from_the_outcomes_where_their_settings_change_and_nothing_is_sampled(
    models, place, capsys, monkeypatch
):
    rows = [{"prompt": f"{i}+0=", "answer": str(i), "r": 1000 + i} for i in range(3)]
    (place / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (place / "users.csv").write_text("rating\n500\n9000\n")
    task = "samples = 2\nmax_new_tokens = 3\ntask = {name = 'file', chat_template = false, test = 'rated.jsonl'}\n"
    (place / "s.toml").write_text(f"{task}[suite.x]\ndiversity = []\n")
    assert evaluate(models / "a", "out", suites="s.toml") == 0
    monkeypatch.setattr(run, "score", None)
    more = "diversity = ['canonical']\nrating = 'r'\npercentile = {file = 'users.csv', source = 'made up'}\n"
    (place / "s.toml").write_text(f"{task}[suite.x]\n{more}")
    capsys.readouterr()
    assert evaluate(models / "a", "out", suites="s.toml") == 0
    said = " ".join(capsys.readouterr().out.split())
    part = json.loads((place / "out" / "results.json").read_text())["suites"]["x"]
    assert part["diversity"]["canonical"]["distinct@2"]["value"] == 0  # a file's answers have no canonical form
    assert part["rating"]["problems"] == 3
    assert "of the users in made up" in said
    if not any(any(row["correct"]) for row in lines(place / "out" / "x.jsonl")):
        assert "x: rating at most" in said
        assert part["rating"]["rating"] is None
    labels = json.loads((place / "out" / "x.forms.json").read_text())
    assert labels == {"problems": [0, 1, 2], "canonical": [[None, None]] * 3}
