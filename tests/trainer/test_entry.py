"""Training from Python: objects become names and files, and the run is one like any other."""

import json
import sys
import types
from pathlib import Path

import pytest
import tiny
from rewards_for_tests import by_length

from examples import from_python
from flowrl_kernels import trainer
from flowrl_kernels.trainer import config_file, entry, reward
from flowrl_kernels.trainer.config import Config, TaskConfig
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.tasks import char_tokenizer
from flowrl_kernels.trainer.tasks.base import Problem
from flowrl_kernels.trainer.tasks.sums import Sums

QUICK = {
    "run": {"steps": 2, "threads": 1, "device": "cpu"},
    "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 4},
    "eval": {"samples": 2, "problems": 4, "exact": False, "start": False},
    "log": {"progress": False, "plots": False, "samples_every": 1},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    char_tokenizer(tiny.ALPHABET).save_pretrained(folder)
    return str(folder)


def tables(model, folder, **more):
    made = {**QUICK, "model": {"name": model}, "task": {"chat_template": False}}
    made["run"] = {**QUICK["run"], "dir": str(folder / "run"), "cache": str(folder / "cache")}
    return {name: {**made.get(name, {}), **more.get(name, {})} for name in {**made, **more}}


def test_the_example_trains_evaluates_and_leaves_a_run_like_any_other(model, tmp_path):
    done = from_python.main(model, str(tmp_path / "run"), **QUICK | {"run": tables(model, tmp_path)["run"]})
    assert done.model == tmp_path / "run" / "final"
    assert (done.model / "config.json").is_file()
    assert 0.0 <= done.figures["accuracy"] <= 1.0
    lines = done.metrics()
    assert [line["step"] for line in lines] == [1, 2]
    for line in lines:  # each reward apart, and the sum by the weights
        assert line["reward"] == pytest.approx(line["reward/right"] + 0.2 * line["reward/brief"], abs=1e-12)
        assert line["accuracy"] == line["reward/right"]
    kept = config_file.load(tmp_path / "run" / "config.toml")
    assert kept.task.reward == ("examples.from_python:right", "examples.from_python:brief")
    assert kept.task.reward_weights == (1.0, 0.2)
    rows = [json.loads(line) for line in Path(kept.task.train).read_text().splitlines()]
    assert rows[1] == {"prompt": "0+2=", "answer": 2}
    shown = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(row["reward/right"] in (0.0, 1.0) for row in shown)


def test_a_script_is_run_again_as_a_module_by_the_processes_that_score(tmp_path, monkeypatch):
    script = tmp_path / "mine.py"
    text = "from flowrl_kernels.trainer import train\ndef size(p, r, a):\n    return len(r) / 4\n"
    script.write_text(text + "if __name__ == '__main__':\n    raise RuntimeError('ran twice')\n")
    monkeypatch.setattr(sys, "path", [*sys.path])
    main = types.ModuleType("__main__")
    main.__file__ = str(script)
    exec(compile(text, str(script), "exec"), main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    name = entry.name_of(main.size, 0, TaskConfig())
    assert name == f"{script}:size"
    assert reward.find_reward(name) is main.size  # here it has run already
    scorer = Scorer(TaskConfig(reward=name, reward_workers=1), Sums())
    assert scorer.score([Problem(0, "p", "a")], ["xyz"]) == [0.75]
    scorer.close()
    script.write_text(text + "train({})\n")
    with pytest.raises(RuntimeError, match='could not start: .*put it behind if __name__ == "__main__"'):
        scorer.score([Problem(0, "p", "a")], ["xyz"])
    del sys.modules[str(script)]


def test_a_function_without_a_name_is_refused_unless_it_may_run_here(model, tmp_path):
    rows = [{"prompt": "1+1=", "answer": 2}]
    with pytest.raises(ValueError, match=r"rewards\[1\]: '.*<lambda>' cannot be found by another process"):
        trainer.train(tables(model, tmp_path), rewards=["exact", lambda p, r, a: 0.0], data=rows)
    assert not (tmp_path / "run").exists()
    here = tables(model, tmp_path, task={"reward_workers": 0}, run={"steps": 1})
    seen = []
    several = [lambda p, r, a: seen.append((p, a)) or 0.25, lambda p, r, a: 0.5]  # two of one name
    done = trainer.train(here, rewards=several, data=rows)
    assert done.metrics()[0]["reward"] == 0.75
    assert set(seen) == {("1+1=", 2)}


def test_a_name_leads_back_to_the_function_itself():
    assert entry.name_of(by_length, 0, TaskConfig()) == "rewards_for_tests:by_length"
    assert reward.find_reward("rewards_for_tests:by_length") is by_length
    other = type(by_length)(by_length.__code__, {}, "by_length")  # of that name, and another function
    other.__module__, other.__qualname__ = by_length.__module__, by_length.__qualname__
    with pytest.raises(ValueError, match=r"rewards\[0\]: 'by_length' cannot be found"):
        entry.name_of(other, 0, TaskConfig())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"config": {"run": {"stepss": 1}}}, "unknown key 'run.stepss'; did you mean 'steps'"),
        ({"config": {"runn": {}}}, "unknown key 'runn'; did you mean 'run'"),
        ({"config": Config(run=Config().run.__class__(steps="3"))}, "run.steps: wanted int; got '3'"),
        ({"rewards": []}, "rewards: wanted at least one"),
        ({"rewards": [3]}, r"rewards\[0\]: wanted a function or a name; got int"),
        ({"config": {"task": {"reward": "math"}}, "rewards": "exact"}, "rewards: task.reward is 'math' already"),
        ({"config": {"task": {"train": "a.jsonl"}}, "data": [{}]}, "data: task.train is set already"),
        ({"data": {"trian": [{}]}}, "data: wanted splits among train, valid, test; got 'trian'"),
        ({"data": []}, r"data\['train'\]: no rows"),
        ({"data": [3]}, r"data\['train'\]: row 0 must be a mapping, got int"),
        ({"data": [{"prompt": object()}]}, r"data\['train'\]: row 0 cannot be written as JSON"),
        ({"rewards": ["exact", "math"], "weights": [1.0]}, "task.reward_weights must be 2, .* got 1"),
        ({"rewards": ["exact"], "weights": [float("nan")]}, "task.reward_weights must be finite"),
    ],
)
def test_what_cannot_be_is_refused_by_name(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"run": {"dir": "run", "cache": "cache"}, "rollout": {"max_new_tokens": 8}}
    arguments = {"config": small, **arguments}
    with pytest.raises(ValueError, match=message):
        trainer.train(**arguments)
    assert not (tmp_path / "run").exists()


def test_a_reward_in_a_file_is_found_by_its_path_and_runs_apart(tmp_path):
    (tmp_path / "beside.py").write_text("SCALE = 2.0\n")
    file = tmp_path / "mine.py"
    file.write_text("from beside import SCALE\ndef size(prompt, response, answer):\n    return SCALE * len(response)\n")
    scorer = Scorer(TaskConfig(reward=f"{file}:size", reward_workers=1), Sums())
    assert scorer.score([Problem(0, "p", "a")] * 2, ["x", "xyz"]) == [2.0, 6.0]
    scorer.close()
    with pytest.raises(ValueError, match="no such file: .*gone.py"):
        Scorer(TaskConfig(reward=f"{tmp_path}/gone.py:size"), Sums())


def test_several_rewards_are_summed_by_weight_and_none_of_one_is_none_of_all():
    names = ("exact", "rewards_for_tests:as_told", "rewards_for_tests:by_length")
    scorer = Scorer(TaskConfig(reward=names, reward_weights=(1.0, 0.5, -2.0), reward_workers=1), Sums())
    answers = ["fine", "none", "raise", "other"]
    got = scorer.score([Problem(0, "p", "fine")] * 4, answers)
    assert got == [1.0 + 0.5 - 2.0 * 0.4, None, None, 0.5 - 2.0 * 0.5]
    assert scorer.parts == {"exact": [1.0, 0.0, 0.0, 0.0], "as_told": [1.0, None, None, 1.0],
                            "by_length": [0.4, 0.4, 0.5, 0.5]}  # fmt: skip
    assert scorer.take_counts() == {"raised": 1, "timed_out": 0, "unscorable": 2}
    assert dict(scorer.reasons) == {"as_told: the reward gave None": 1, "as_told: RuntimeError: told to raise": 1}
    assert scorer.first.score([Problem(0, "p", "fine")], ["fine"]) == [1.0]  # an evaluation goes by this one
    scorer.close()


def test_rewards_of_one_name_are_told_apart():
    assert reward.labels(["math", "a.b:f", "c:f", ""]) == ["math", "a.b:f", "c:f", "task"]
    assert reward.labels(["exact", "exact"]) == ["exact#1", "exact#2"]


def test_what_may_hang_keeps_its_processes():
    with pytest.raises(ValueError, match="task.reward_workers must be at least 1 for 'math'"):
        Scorer(TaskConfig(reward="math", reward_workers=0), Sums())
    with pytest.raises(ValueError, match="task.reward_workers must be at least 1 for 'sums'"):
        Scorer(TaskConfig(reward_workers=0), Sums(trusted=False))
    scorer = Scorer(TaskConfig(reward="rewards_for_tests:as_told", reward_workers=0), Sums())
    assert scorer.score([Problem(0, "p", "a")] * 3, ["fine", "raise", "none"]) == [1.0, None, None]
    assert scorer.take_counts() == {"raised": 1, "timed_out": 0, "unscorable": 2}


def test_one_or_several_are_read_from_toml_and_from_the_command_line(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[task]\nreward = ["math", "m:length"]\nreward_weights = [1, 0.2]\n')
    config = config_file.load(file)
    assert config.task.reward == ("math", "m:length")
    assert config.task.reward_weights == (1.0, 0.2)
    assert config_file.make(config) == config
    file.write_text(config_file.dumps(config))
    assert config_file.load(file) == config
    assert config_file.override(config, ["--task.reward", "exact"]).task.reward == "exact"
    assert config_file.override(config, ["--task.reward", "exact", "m:f"]).task.reward == ("exact", "m:f")
    file.write_text("[task]\nreward = [1]\n")
    with pytest.raises(ValueError, match="task.reward: wanted str; got 1"):
        config_file.load(file)
