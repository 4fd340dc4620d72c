"""The command line: every refusal is one line and exit code 2, and leaves nothing behind."""

import json
import os
import sys
from pathlib import Path

import pytest
import tiny

from flowrl_kernels.trainer import __main__ as main
from flowrl_kernels.trainer import compare, config_file
from flowrl_kernels.trainer.tasks import char_tokenizer

SMALL = [*tiny.SMALL, *tiny.flags("run.steps 1")]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working folder with a config, a broken one, a model and data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.toml").write_text("")
    (tmp_path / "broken.toml").write_text("[run\nsteps = 1")
    (tmp_path / "typo.toml").write_text("[run]\nstepss = 1")
    (tmp_path / "type.toml").write_text("[run]\nsteps = 'many'")
    (tmp_path / "latin.toml").write_bytes(b"[task]\nsystem = '\xff'")
    (tmp_path / "methods.toml").write_text("[compare.mine]\noptim.lrr = 1.0")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"prompt": "4=", "answer": "4"}\n')
    (tmp_path / "torn.jsonl").write_text('{"prompt": "4="')
    (tmp_path / "not_a_run").mkdir()
    (tmp_path / "not_a_run" / "config.toml").write_text("")
    return tmp_path


ROWS = ["--task.name", "file", "--task.reward", "exact", "--task.chat_template", "False"]
BAD = [
    (["trian", "a.toml"], "unknown command 'trian'"),
    (["train"], "wanted a TOML file first"),
    (["train", "--run.steps", "1"], "wanted a TOML file first"),
    (["train", "none.toml"], "none.toml does not exist"),
    (["train", "empty"], "is a folder"),
    (["train", "broken.toml"], "not TOML"),
    (["train", "latin.toml"], "not TOML"),
    (["train", "typo.toml"], "typo.toml:2: unknown key 'run.stepss'; did you mean 'steps'"),
    (["train", "type.toml"], "run.steps: wanted int; got 'many'"),
    (["train", "a.toml", "--run.stepss", "1"], "unknown option '--run.stepss'; did you mean '--run.steps'"),
    (["train", "a.toml", "--run.steps", "many"], "--run.steps: wanted int; got 'many'"),
    (["train", "a.toml", "--run.steps"], "--run.steps: wanted one value"),
    (["train", "a.toml", "--run.steps", "1", "2"], "--run.steps: wanted one value"),
    (["train", "a.toml", "--optim.betas", "0.9"], "--optim.betas: wanted 2 values"),
    (["train", "a.toml", "--optim.lr", "quick"], "--optim.lr: wanted float"),
    (["train", "a.toml", "--run.resume", "maybe"], "--run.resume: wanted True or False"),
    (["train", "a.toml", "--algorithm.name", "grp"], "--algorithm.name: wanted one of 'flowrl'"),
    (["train", "a.toml", "stray"], "wanted one value; got 'cache stray'"),
    (["train", "a.toml", "--run.dir", "file/run"], "run.dir: cannot write to"),
    (["train", "a.toml", "--resume"], "holds no run"),
    (["train", "a.toml", "--algorithm.preset", "papper"], "papper"),
    (["train", "a.toml", "--task.name", "sumz"], "task.name must be"),
    (["train", "a.toml", "--task.name", "nowhere:task"], "nowhere"),
    (["train", "a.toml", "--task.reward", "maths"], "task.reward must be"),
    (["train", "a.toml", "--task.reward", "nowhere:reward"], "nowhere"),
    (["train", "a.toml", "--task.reward_timeout", "0"], "task.reward_timeout"),
    (["train", "a.toml", *ROWS, "--task.train", "none.jsonl"], "none.jsonl"),
    (["train", "a.toml", *ROWS, "--task.train", "torn.jsonl", "--model.name", "model"], "torn.jsonl:1"),
    (["train", "a.toml", "--model.name", "./none"], "model.name: './none' cannot be loaded"),
    (["train", "a.toml", "--model.name", "empty"], "empty"),
    (["train", "a.toml", "--model.liger", "True"], "liger"),
    (["train", "a.toml", "--log.tensorboard", "True"], "log.tensorboard: tensorboard is not installed"),
    (["train", "a.toml", "--log.wandb", "True"], "log.wandb: wandb is not installed"),
    (["train", "a.toml", "--log.samples_every", "0"], "log.samples_every"),
    (["train", "a.toml", "--parallel.impl", "cuda"], "cuda"),
    (["train", "a.toml", "--parallel.dtype", "int8"], "parallel.dtype"),
    (["train", "a.toml", "--rollout.prompts", "0"], "rollout.prompts"),
    (["plot"], "the following arguments are required: RUN"),
    (["plot", "empty"], "has no metrics.jsonl"),
    (["plot", "none"], "has no metrics.jsonl"),
    (["plot", "--out"], "expected one argument"),
    (["export", "none"], "the following arguments are required: FOLDER"),
    (["export", "empty", "out"], "holds no run"),
    (["export", "not_a_run", "out"], "no checkpoint yet"),
    (["export", "empty", "out", "--dtype", "int8"], "invalid choice: 'int8'"),
    (["eval"], "the following arguments are required: RUN_OR_FOLDER"),
    (["eval", "empty"], "holds no run"),
    (["eval", "a.toml"], "model.name: name the Hugging Face model"),
    (["eval", "empty", "--split", "tset"], "invalid choice: 'tset'"),
    (["eval", "not_a_run", "--config", "a.toml"], "--config: goes with a Hugging Face folder"),
    (["compare"], "the following arguments are required: config"),
    (["compare", "none.toml"], "none.toml does not exist"),
    (["compare", "methods.toml"], "methods.toml:2: unknown key 'optim.lrr'"),
    (["compare", "a.toml", "--only", "ppoo"], "--only: wanted one of"),
    (["compare", "a.toml", "--rollout.prompts", "0"], "flowrl: rollout.prompts"),
]


@pytest.mark.parametrize(("args", "said"), BAD, ids=[" ".join(args) for args, _ in BAD])
def test_a_bad_command_line_ends_in_one_line_and_code_2_and_leaves_nothing(place, capfd, args, said, monkeypatch):
    if "--log.tensorboard" in args:
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    if "--log.wandb" in args:
        monkeypatch.setitem(sys.modules, "wandb", None)
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*")}
    if args[:2] == ["train", "a.toml"]:
        args = [*args[:2], *SMALL, "--run.dir", "run", "--run.cache", "cache", *args[2:]]
    assert main.cli(args) == 2
    error = capfd.readouterr().err
    assert said in error
    assert len(error.splitlines()) == 1, error
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*")} == before


def test_a_device_that_is_not_there_is_one_line(place, capfd, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main.cli(["train", "a.toml", *SMALL, "--run.dir", "run", "--run.device", "cuda"]) == 2
    assert capfd.readouterr().err == "flowrl train: run.device: 'cuda' was asked for, and PyTorch sees no CUDA device\n"
    assert not (place / "run").exists()


@pytest.mark.parametrize("command", [[], ["train"], ["train", "a.toml"], ["plot"], ["export"], ["eval"], ["compare"]])
def test_help_is_printed_and_ends_with_code_0(place, capsys, command):
    assert main.cli([*command, "--help"]) == 0
    assert "usage: flowrl" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- compare


def test_a_comparison_takes_the_files_own_settings_and_replaces_nothing_unasked(place, monkeypatch, capsys):
    (place / "my.toml").write_text("[run]\nsteps = 3\n[optim]\nlr = 1e-5\n[rollout]\nmax_new_tokens = 9\n")
    seen = []

    def run(command, check):
        seen.append(config_file.load(command[-1]))
        return type("Done", (), {"returncode": 3})()

    monkeypatch.setattr(compare.subprocess, "run", run)
    assert main.cli(["compare", "my.toml", "--only", "grpo", "--out", "c", "--optim.warmup", "4"]) == 1
    [config] = seen
    assert (config.run.steps, config.optim.lr, config.algorithm.name, config.optim.warmup) == (3, 1e-5, "grpo", 4)
    assert (config.run.dir, config.run.overwrite) == ("c/grpo", False)
    (place / "c" / "ppo").mkdir(parents=True)
    (place / "c" / "ppo" / "metrics.jsonl").write_text("")
    assert main.cli(["compare", "my.toml", "--out", "c"]) == 2  # before any of them starts
    assert "ppo: run.dir: c/ppo holds a run" in capsys.readouterr().err
    assert len(seen) == 1


def test_the_sums_file_has_the_rates_that_its_comparison_was_made_with(monkeypatch, tmp_path):
    file = str(Path(config_file.__file__).parents[2] / "configs" / "sums.toml")
    made = compare.configs(file, None, [], tmp_path)
    rates = {name: (c.algorithm.name, c.optim.lr, c.run.steps) for name, c in made.items()}
    assert rates == {
        "flowrl": ("flowrl", 5e-4, 3000),
        "grpo": ("grpo", 2.5e-4, 1200),
        "ppo": ("ppo", 2e-4, 1200),
        "reinforce_pp": ("reinforce_pp", 2e-4, 1200),
    }
    assert compare.configs(file, ["grpo"], ["--optim.lr", "1e-3"], tmp_path)["grpo"].optim.lr == 1e-3


# ------------------------------------------------------------------------------------------- one's own code and models


def test_a_module_in_the_working_folder_is_found_and_a_home_folder_is_spelt_out(place, monkeypatch):
    (place / "my_own_reward.py").write_text("def score(prompt, response, answer):\n    return 1.0\n")
    monkeypatch.setenv("HOME", str(place))
    path = [entry for entry in sys.path if entry not in ("", os.getcwd())]
    monkeypatch.setattr(sys, "path", path)
    own = ["--task.reward", "my_own_reward:score", "--task.reward_workers", "1"]
    assert main.cli(["train", "a.toml", *SMALL, "--run.dir", "~/run", "--run.cache", "~/c", *own]) == 0
    lines = [json.loads(line) for line in (place / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["reward"] for line in lines if line["kind"] == "train"] == [1.0]
    assert not (place / "~").exists()


def test_a_hugging_face_folder_is_evaluated_with_the_task_of_a_file_or_of_flags(place, capsys):
    from flowrl_kernels.trainer import policy

    actor = policy.make_policy(tiny.config(), tiny.ALONE, tiny.model())
    policy.save_folder(actor, char_tokenizer(tiny.ALPHABET), place / "model", tiny.ALONE)
    (place / "task.toml").write_text(
        "[task]\nname = 'file'\ntest = 'rows.jsonl'\nreward = 'exact'\nchat_template = false\n"
        "[rollout]\nmax_new_tokens = 3\n[eval]\nsamples = 2\n"
    )
    assert main.cli(["eval", "model", "--config", "task.toml", "--out", "figures.json"]) == 0
    assert json.loads((place / "figures.json").read_text())["figures"]["problems"] == 1
    flags = [*ROWS, "--task.valid", "rows.jsonl", "--rollout.max_new_tokens", "3", "--eval.samples", "2"]
    assert main.cli(["eval", "model", "--split", "valid", *flags]) == 0
    assert "valid split" in capsys.readouterr().out
