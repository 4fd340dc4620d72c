"""What is knowable at the start is refused at the start, by name and in one line, before any step."""

import json
import sys

import pytest
import tiny

from flowrl_kernels.trainer import __main__ as main
from flowrl_kernels.trainer import config_file, loop, packages
from flowrl_kernels.trainer import run as runs
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.tasks import char_tokenizer

SMALL = [*tiny.SMALL, *tiny.flags("run.steps 2")]
USER = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
USER += "{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's model folder: a tiny Qwen2 of context 32 with a chat template that knows no system role."""
    path = tmp_path_factory.mktemp("model")
    cfg = tiny.config(model={"context": 32})
    model = tiny.model(cfg)
    tokenizer = char_tokenizer(tiny.ALPHABET)
    tokenizer.chat_template = USER
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def data(path, *prompts):
    path.write_text("".join(json.dumps({"prompt": prompt, "answer": "3"}) + "\n" for prompt in prompts))
    return str(path)


def said(tmp_path, capsys, *args):
    """The one line that a refused start ends in; nothing was trained."""
    file = tmp_path / "run.toml"
    file.write_text("")
    place = ["--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "cache")]
    code = main.cli(["train", str(file), *SMALL, *place, *args])
    error = capsys.readouterr().err
    assert code == 2, error
    assert "Traceback" not in error
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert not metrics.exists() or '"train"' not in metrics.read_text()
    return error


@pytest.mark.parametrize(
    ("args", "wanted"),
    [
        ("rollout.max_new_tokens 12  parallel.max_tokens 10", "parallel.max_tokens: wanted at least 14"),
        ("parallel.row_tokens 7", "parallel.row_tokens: wanted at least 8, for a prompt of 3 and a response of 6"),
        ("algorithm.preset rebel  parallel.max_tokens 20", "preset 'rebel' wants a group in one micro-batch"),
        ("algorithm.preset gvpo  parallel.max_tokens 20", "up to 4 x 8 tokens; got 20"),
        ("rollout.samples 1  algorithm.name grpo", "rollout.samples: wanted at least 2, grpo compares"),
        ("rollout.samples 1  algorithm.name dapo", "rollout.samples: wanted at least 2, dapo compares"),
        ("rollout.samples 1", "rollout.samples: wanted at least 2, algorithm.reward = 'zscore'"),
        ("rollout.samples 1  algorithm.reward raw  algorithm.preset agro", "log Z by the group's mean (agro)"),
        ("rollout.samples 1  algorithm.name ppo  algorithm.filter_groups True", "algorithm.filter_groups compares"),
        ("algorithm.overlong_buffer 9", "algorithm.overlong_buffer: wanted at most rollout.max_new_tokens = 6"),
        ("algorithm.unlikeliness -1.0", "algorithm.unlikeliness: wanted at least 0"),
        ("algorithm.kl 0.1", "algorithm.kl: wanted 0.0, flowrl does not use it; got 0.1"),
        ("algorithm.entropy 0.1", "algorithm.entropy: wanted 0.0, flowrl does not use it"),
        ("algorithm.name grpo  algorithm.gae_lambda 0.9", "algorithm.gae_lambda: wanted 1.0, grpo does not use it"),
        ("algorithm.tis_cap 2  algorithm.correction token_mask", "algorithm.tis_cap: wanted 0.0 beside"),
        ("algorithm.correction tokens", "algorithm.correction: wanted one of"),
        ("algorithm.correction token_k2", "algorithm.correction_cap: wanted a bound for 'token_k2'"),
        ("algorithm.correction_cap 2", "algorithm.correction_cap: wanted none without a correction"),
        ("algorithm.correction token_mask  algorithm.preset release_tis_sum", "algorithm.correction: preset"),
        ("algorithm.name raft  algorithm.clip 0.8 1.2", "algorithm.clip: wanted none, raft has no ratio"),
        ("algorithm.clip 1.2 0.8", "algorithm.clip: wanted a range [low, high]"),
        ("algorithm.preset papr", "preset: wanted one of 'paper'"),
        ("eval.temperature -1", "eval.temperature: wanted at least 0"),
        ("eval.temperature nan", "eval.temperature: wanted"),
        ("rollout.temperature 0", "rollout.temperature: wanted more than 0"),
        ("rollout.temperature inf", "rollout.temperature: wanted a finite number"),
        ("optim.lr nan", "optim.lr: wanted"),
        ("log.samples_every 0", "log.samples_every: wanted at least 1; got 0"),
        ("run.device cuda", "run.device: 'cuda' was asked for, and PyTorch sees no CUDA device"),
        ("model.liger True", "model.liger: liger_kernel is not installed: pip install 'flowrl-kernels[liger]'"),
        ("log.tensorboard True", "log.tensorboard: tensorboard is not installed"),
        ("log.wandb True", "log.wandb: wandb is not installed"),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(tmp_path, capsys, monkeypatch, args, wanted):
    for module, *_ in packages.PACKAGES.values():
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(loop.parallel.torch.cuda, "is_available", lambda: False)
    words = [[f"--{key}", *values] for key, *values in (part.split() for part in args.split("  "))]
    assert wanted in said(tmp_path, capsys, *[word for part in words for word in part])


def test_an_implementation_that_no_operator_has_is_no_choice(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[parallel]\nimpl = "cuda"\n')
    with pytest.raises(ValueError, match=r"run\.toml:2: parallel\.impl: wanted one of 'auto', .*got 'cuda'"):
        config_file.load(file)


def own(folder, tmp_path, *prompts):
    source = ["--model.name", str(folder), "--task.name", "file", "--task.train", data(tmp_path / "a.jsonl", *prompts)]
    return [*source, "--task.reward", "exact", "--rollout.max_new_tokens", "6"]


def test_an_evaluation_on_the_way_needs_a_valid_split(folder, tmp_path, capsys):
    error = said(tmp_path, capsys, *own(folder, tmp_path, "1+2="), "--eval.every", "1")
    assert "eval.every: wanted a valid split to evaluate on (task.valid), or 0; got 1 and none" in error


def test_training_prompts_past_the_context_are_left_out_and_evaluated_ones_refused(folder, tmp_path, capsys):
    long = "1+" * 14 + "1="  # 30 tokens; 6 of response leave 26 of 32
    args = ["--run.dir", str(tmp_path / "ok"), "--run.steps", "1", *own(folder, tmp_path, "1+2=", long, "2+1=")]
    loop.train(config_file.override(Config(), [*SMALL, *args]))
    notes = (tmp_path / "ok" / "metrics.jsonl").read_text()
    assert "1 of 3 prompts are longer than 26 tokens: left out" in notes
    for split, every in (("test", "0"), ("valid", "1")):
        place = tmp_path / split
        place.mkdir()
        other = data(place / "b.jsonl", "1+2=", long)
        error = said(place, capsys, *own(folder, place, "1+2="), f"--task.{split}", other, "--eval.every", every)
        wanted = (
            f"task.{split}: the prompt of problem 1 (30 tokens) and a response (6) exceed the model's context of 32"
        )
        assert wanted in error


def test_a_response_alone_longer_than_the_context_is_refused(folder, tmp_path, capsys):
    error = said(tmp_path, capsys, *own(folder, tmp_path, "1+2="), "--rollout.max_new_tokens", "32")
    assert "prompt (1) and response (32) exceed the model's context of 32" in error


def test_a_chat_template_without_a_system_role_is_named(folder, tmp_path, capsys):
    error = said(tmp_path, capsys, *own(folder, tmp_path, "1+2="), "--task.system", "Add.")
    assert "task.system: the chat template of" in error
    assert "no system role" in error


class Silent(runs.Scorer):
    def score(self, problems, responses):
        self.last_error = "ImportError: no module named verifier"
        return [None] * len(responses)


def test_a_reward_that_scores_nothing_stops_the_run_with_its_reason(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "Scorer", Silent)
    error = said(tmp_path, capsys)
    assert "task.reward: none of the first step's responses could be scored: ImportError: no module named" in error
