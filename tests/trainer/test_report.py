import json
import math

import pytest
import tiny
import torch

from flowrl_kernels.trainer import policy, report, terminal
from flowrl_kernels.trainer.config import EvalConfig, TaskConfig
from flowrl_kernels.trainer.evaluate import Response, exact, sampled, spread, summarize
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.tasks import build_task
from flowrl_kernels.trainer.tasks.base import Problem
from flowrl_kernels.trainer.tasks.sums import Sums


def sample(problems, n, seed, first):
    """Right for even numbers of the problem; the text tells what it was drawn by."""
    return [
        [
            Response(f"{p.answer - j if (first + i) % 2 == 0 else 99}+{j}+0", seed + first + i, j > 0)
            for j in range(n)
        ]
        for i, p in enumerate(problems)
    ]  # fmt: skip


def done(at_once=0, progress=None, seed=3):
    task = Sums()
    cfg = EvalConfig(problems=6, samples=2, seed=seed)
    return sampled(task, "test", sample, Scorer(TaskConfig(), task), cfg, at_once=at_once, progress=progress)


def test_an_evaluation_in_parts_draws_the_same_samples_and_tells_how_far_it_is():
    seen = []
    assert done(4, lambda *state: seen.append(state)) == done()
    assert seen == [(4, 6), (6, 6)]


def test_progress_is_a_line_every_ten_seconds_where_there_is_no_terminal(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    screen = terminal.Terminal()
    for second, done in ((100, 1), (109, 2), (110, 3), (111, 4), (120, 5), (121, 6)):
        now[0] = float(second)
        screen.evaluating("test", done, 6)
    wanted = [f"evaluation (test): {done}/6 problems" for done in (3, 5)]
    assert capsys.readouterr().err.splitlines() == wanted


def test_the_file_holds_what_repeats_the_evaluation_and_every_result(tmp_path):
    config = tiny.config(eval={"problems": 6, "samples": 2, "seed": 3})
    actor = policy.Policy(tiny.model(config))
    found = report.contents(config, "runs/x", "step_7", "test", done(), actor)
    path = report.write(tmp_path / "evaluations", found)
    assert path.name.startswith("test-step_7-")
    read = json.loads(path.read_text())
    assert read["figures"]["accuracy"] == 0.5
    assert read["seed"] == 3
    assert read["settings"]["eval.samples"] == 2
    assert read["settings"]["task.name"] == "sums"
    assert read["versions"]["torch"] == torch.__version__
    assert [row["rewards"] for row in read["problems"]] == [[1.0, 1.0], [0.0, 0.0]] * 3
    assert read["problems"][1]["tokens"] == [4, 4]
    assert report.write(tmp_path / "evaluations", found) == path  # a repetition replaces its like
    with torch.no_grad():
        next(actor.model.parameters()).view(-1)[0] += 1e-3
    other = report.contents(config, "runs/x", "step_7", "test", done(), actor)
    assert other["hashes"]["weights"] != found["hashes"]["weights"]
    assert report.write(tmp_path / "evaluations", other) != path


def test_the_hash_of_the_data_sees_order_prompt_and_answer():
    rows = [Problem(0, "a", 1), Problem(1, "b", {"x": [2]})]
    first = report.data_hash(rows)
    assert first == report.data_hash(list(rows))
    for changed in ([rows[1], rows[0]], [rows[0]], [Problem(0, "a", "1"), rows[1]], [Problem(0, "A", 1), rows[1]]):
        assert report.data_hash(changed) != first


def test_a_figure_that_is_not_finite_is_null(tmp_path):
    actor = policy.Policy(tiny.model())
    found = report.contents(tiny.config(), "x", None, "test", done(), actor)
    found["figures"]["accuracy_se"] = math.nan
    assert json.loads(report.write(tmp_path, found).read_text())["figures"]["accuracy_se"] is None


def test_a_task_without_the_notion_of_equal_answers_has_no_distinct_figure(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "x", "answer": 1}')
    task = build_task(TaskConfig(name="file", train=str(tmp_path / "a.jsonl")))
    problems = task.problems("train")
    for text, reward in (("1", 1.0), ("2", 0.0)):
        got = summarize(task, problems, [[Response(text, 2, True)]], [reward], [1])
        assert got["accuracy"] == reward
        assert not {"distinct", "effective_modes", "distinct_share"} & got.keys()
    sums = Sums()
    got = summarize(sums, sums.problems("test")[:1], [[Response("x", 2, True)]], [0.0], [1])
    assert got["distinct"] == 0.0  # it knows its solutions, and none was found


@pytest.mark.parametrize(
    ("total", "count", "wanted"),
    [(20, 4, {2, 7, 12, 17}), (20, 20, set(range(20))), (3, 9, {0, 1, 2}), (5, 0, set()), (20, 1, {10})],
)
def test_a_few_problems_are_spread_over_the_split(total, count, wanted):
    assert spread(total, count) == wanted


def test_exact_figures_on_the_way_list_every_response_of_a_few_problems_only():
    sums, asked = Sums(), []

    def uniform(problems, texts):
        asked.append(len(texts))
        return torch.full((len(texts),), -math.log(1000.0), dtype=torch.float64)

    got = exact(sums, "test", uniform, uniform, beta=1.0, cfg=EvalConfig(), kl_problems=4)
    assert sum(n == 1000 for n in asked) == 8  # policy and reference
    solutions = [len(sums.solutions(sums.problems("test")[i])) for i in (2, 7, 12, 17)]
    z = [math.log((1000 - n + n * math.exp(6)) / 1000) / 6 for n in solutions]
    assert got["log_z_exact"] == pytest.approx(sum(z) / 4)
    assert got["exact_accuracy"] == pytest.approx(sum(len(sums.solutions(p)) for p in sums.problems("test")) / 20_000)
