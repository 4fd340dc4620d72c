"""The loop from the outside: bad input is refused before a step, bad numbers cost a step, odd rewards cost nothing."""

import itertools
import json
import math
import sys

import pytest
import tiny
import torch
from safetensors.torch import load_file

from flowrl_kernels.log_partition import LOG_Z_FILE
from flowrl_kernels.presets import PRESETS
from flowrl_kernels.trainer import __main__ as main
from flowrl_kernels.trainer import config_file, loop
from flowrl_kernels.trainer import run as runs
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.loop import learning_rate, prompt_numbers, share

SMALL = [*tiny.SMALL, *tiny.flags("run.steps 2")]


def settings(tmp_path, *args):
    return config_file.override(
        Config(), [*SMALL, "--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "cache"), *args]
    )


def lines(tmp_path, kind):
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    return [row for row in map(json.loads, text.splitlines()) if row["kind"] == kind]


# ------------------------------------------------------------------------------------------- what a run leaves


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with warm start, evaluation, checkpoint and export."""
    tmp_path = tmp_path_factory.mktemp("finished")
    on = "eval.every 1  eval.start True  eval.exact True  checkpoint.export True  log.plots True"
    loop.train(settings(tmp_path, *tiny.flags(f"warm.steps 3  warm.batch 8  {on}")))
    return tmp_path


def test_a_run_leaves_its_config_metrics_samples_checkpoint_and_model(finished):
    run = finished / "run"
    assert {"config.toml", "metrics.jsonl", "samples.jsonl", "checkpoints", "start", "final", "plots"} <= {
        p.name for p in run.iterdir()
    }
    assert config_file.load(run / "config.toml").rollout.prompts == 4
    assert [row["step"] for row in lines(finished, "train")] == [1, 2]
    assert [(row["step"], row["split"]) for row in lines(finished, "eval")] == [
        (0, "test"),
        (1, "valid"),
        (2, "test"),
    ]
    assert "accuracy" in lines(finished, "final")[0]
    assert all(math.isfinite(row["loss"]) and row["tokens_per_s"] > 0 for row in lines(finished, "train"))


def test_export_and_eval_work_on_a_finished_run(finished, capsys):
    out = finished / "exported"
    assert main.cli(["export", str(finished / "run"), str(out)]) == 0
    for name in ("model.safetensors", LOG_Z_FILE):
        ours, theirs = load_file(out / name), load_file(finished / "run" / "final" / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert main.cli(["eval", str(finished / "run"), "--eval.problems", "3", "--split", "valid"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main.cli(["export", str(finished / "run"), str(out)]) == 2  # never over something


def test_the_warm_start_is_read_from_the_cache_the_second_time(finished, tmp_path):
    args = ["--warm.steps", "3", "--warm.batch", "8", "--run.steps", "0", "--run.cache", str(finished / "cache")]
    loop.train(settings(tmp_path, *args))
    assert any("warm start read from" in row["text"] for row in lines(tmp_path, "note"))
    weights = [p / "run" / "start" / "model.safetensors" for p in (finished, tmp_path)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_a_hugging_face_folder_trains_on_a_file_of_prompts(finished, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}=", "answer": str(i)}) + "\n" for i in range(4, 10)))
    source = ["--model.name", str(finished / "run" / "final"), "--task.name", "file", "--task.train", str(data)]
    source += ["--task.test", str(data), "--task.reward", "exact", "--task.chat_template", "False"]
    loop.train(settings(tmp_path, *source))
    assert len(lines(tmp_path, "train")) == 2
    assert not (tmp_path / "run" / "start").exists()
    assert main.cli(["export", str(tmp_path / "run"), str(tmp_path / "out")]) == 0
    asked = ["--task.test", str(data), "--task.name", "file", "--task.reward", "exact"]
    sums = ["eval", str(finished / "run"), *asked, "--task.chat_template", "False"]
    assert main.cli(sums) == 0  # a run is evaluated on any file


def test_prompts_wrapped_in_a_chat_template_need_one(finished, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "4=", "answer": "4"}\n')
    with pytest.raises(ValueError, match=r"task\.chat_template: .* has no chat template"):
        loop.train(
            settings(tmp_path, "--model.name", str(finished / "run" / "final"), "--task.name", "file",
                     "--task.train", str(data), "--task.reward", "exact")
        )  # fmt: skip


def test_an_engine_gets_the_weights_before_the_first_prompt_and_after_every_step(monkeypatch, tmp_path):
    calls = []
    from flowrl_kernels.trainer.rollout.hf import HFEngine

    generate, update = HFEngine.generate, HFEngine.update_weights
    monkeypatch.setattr(HFEngine, "update_weights", lambda *a: calls.append(a[-1]) or update(*a))
    monkeypatch.setattr(HFEngine, "release", lambda self: calls.append("release"))
    monkeypatch.setattr(HFEngine, "generate", lambda *a, **k: calls.append("generate") or generate(*a, **k))
    loop.train(settings(tmp_path, "--algorithm.minibatch_prompts", "2"))
    assert calls[:7] == [0, "generate", "release", 2, "generate", "release", 4]


def test_samples_to_read_have_their_rewards(finished):
    rows = [json.loads(line) for line in (finished / "run" / "samples.jsonl").read_text().splitlines()]
    assert rows[0].keys() >= {"step", "prompt", "response", "reward"}


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--rollout.max_new_tokens", "3"], "rollout.max_new_tokens: sums's longest answer has 6 tokens; got 3"),
        (["--model.context", "8"], "exceed the model's context of 8"),
        (["--task.name", "file", "--task.train", "/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--rollout.max_prompt_tokens", "2"], "no training problem (of 20) with a prompt of at most 2 tokens"),
        (["--run.resume", "True"], "holds no run"),
        (["--parallel.max_tokens", "5"], "parallel.max_tokens: wanted at least 8"),
        (["--rollout.top_p", "0.9", "--parallel.epsilon", "0.01"], "rollout.top_p: wanted 1.0 beside parallel.epsilon"),
    ],
)
def test_bad_settings_end_in_one_line_that_names_them(tmp_path, capsys, args, said):
    file = tmp_path / "run.toml"
    file.write_text("")
    base = [*SMALL, "--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "cache")]
    assert main.cli(["train", str(file), *base, *args]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_missing_extra_ends_in_one_line_that_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    file = tmp_path / "run.toml"
    file.write_text("")
    assert main.cli(["train", str(file), "--run.steps", "1"]) == 2
    assert "transformers is not installed: pip install 'flowrl-kernels[train]'" in capsys.readouterr().err


def test_a_malformed_row_is_named_by_its_line(tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "1", "answer": "2"}\n{"prompt": "1"\n')
    with pytest.raises(ValueError, match=r"data\.jsonl:2"):
        loop.train(settings(tmp_path, "--task.name", "file", "--task.train", str(data), "--task.reward", "exact"))


def test_a_run_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match=r"run\.dir: cannot write to"):
        loop.train(settings(tmp_path, "--run.dir", str(blocked / "run")))


def test_another_runs_folder_is_not_overwritten_unasked(tmp_path):
    loop.train(settings(tmp_path, "--run.steps", "1"))
    with pytest.raises(ValueError, match="holds a run; use --resume"):
        loop.train(settings(tmp_path, "--run.steps", "1"))
    loop.train(settings(tmp_path, "--run.steps", "1", "--run.overwrite", "True"))
    assert len(lines(tmp_path, "train")) == 1


# ------------------------------------------------------------------------------------------- bad numbers


class Rewards(runs.Scorer):
    """Scores every response by `give`, whatever it says."""

    give = staticmethod(lambda i: 1.0)

    def score(self, problems, responses):
        return [self.give(i) for i in range(len(responses))]


def train_with(monkeypatch, tmp_path, give, *args):
    monkeypatch.setattr(Rewards, "give", staticmethod(give))
    monkeypatch.setattr(runs, "Scorer", Rewards)
    return loop.train(settings(tmp_path, *args))


@pytest.mark.parametrize("name", ["flowrl", "grpo", "dapo", "ppo", "reinforce_pp", "reinforce_rej", "raft"])
@pytest.mark.parametrize("give", [lambda i: 1.0, lambda i: 0.0, lambda i: None], ids=["ones", "zeros", "unscorable"])
def test_rewards_that_are_all_equal_or_missing_leave_the_numbers_finite(monkeypatch, tmp_path, name, give):
    first = iter([True])  # the very first response is scored: a reward that never scores any is refused
    train_with(monkeypatch, tmp_path, lambda i: 0.0 if next(first, False) else give(i), "--algorithm.name", name)
    rows = lines(tmp_path, "train")
    assert len(rows) == 2
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"]) for row in rows)
    assert rows[-1]["skipped"] == 0


def test_a_response_whose_sampling_log_probs_are_broken_is_left_out(monkeypatch, tmp_path):
    from flowrl_kernels.trainer.rollout.hf import HFEngine

    generate = HFEngine.generate

    def broken(*args, **kwargs):
        out = generate(*args, **kwargs)
        out.logp[0, 0] = float("nan")
        return out

    monkeypatch.setattr(HFEngine, "generate", broken)
    train_with(monkeypatch, tmp_path, lambda i: 5.0 if i == 0 else 1.0)
    assert all(row["reward"] == 1.0 and math.isfinite(row["loss"]) for row in lines(tmp_path, "train"))
    assert any("not finite" in row["text"] for row in lines(tmp_path, "note"))


def test_unscorable_responses_are_left_out_of_the_mean(monkeypatch, tmp_path):
    train_with(monkeypatch, tmp_path, lambda i: None if i % 2 else 1.0)
    assert all(row["reward"] == 1.0 for row in lines(tmp_path, "train"))


def test_an_update_that_is_not_finite_is_skipped_counted_and_named(monkeypatch, tmp_path):
    bad = iter([True, False, False])
    make = runs.objective.make_loss

    def poisoned(config):
        loss = make(config)

        def wrapped(batch, **counts):
            head = loss(batch, **counts)
            factor = float("nan") if next(bad) else 1.0

            def inner(actor, hidden):
                out = head(actor, hidden)
                return out._replace(loss=out.loss * factor)

            return inner

        return wrapped

    monkeypatch.setattr(runs.objective, "make_loss", poisoned)
    train_with(monkeypatch, tmp_path, lambda i: float(i % 3), "--run.steps", "3")
    rows = lines(tmp_path, "train")
    assert [row["skipped"] for row in rows] == [1, 1, 1]
    assert any("update 1 skipped: loss nan" in row["text"] for row in lines(tmp_path, "note"))
    assert all(math.isfinite(row["loss"]) for row in rows[1:])  # the weights were left alone


def test_an_update_without_anything_to_learn_from_takes_its_turn_in_the_schedule(monkeypatch, tmp_path):
    calls = iter(range(99))  # rewards of steps 1 and 2 are all equal (dapo leaves such groups out), then they differ
    args = "algorithm.name dapo  run.steps 5  optim.schedule linear  optim.warmup 0  optim.lr 1e-3"
    seen = {}

    def give(i):
        if i == 0:
            seen["step"] = next(calls)
        return 1.0 if seen["step"] < 2 else float(i % 2)

    train_with(monkeypatch, tmp_path, give, *tiny.flags(args))
    rows = lines(tmp_path, "train")
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert [row["grad_norm"] > 0 for row in rows] == [False, False, True, True, True]


def test_too_many_bad_updates_in_a_row_stop_the_run(monkeypatch, tmp_path):
    monkeypatch.setattr(loop.parallel, "clip", lambda parameters, most: torch.tensor(float("inf")))
    with pytest.raises(loop.NotFinite, match=r"2 in a row \(run.max_bad_updates\)"):
        train_with(monkeypatch, tmp_path, lambda i: float(i), "--run.max_bad_updates", "2", "--run.steps", "9")
    assert not (tmp_path / "run" / "checkpoints").exists()


# ------------------------------------------------------------------------------------------- pure functions


def test_each_epoch_asks_every_problem_once_in_an_order_of_its_own():
    asked = [i for step in range(1, 9) for i in prompt_numbers(3, step, 5, 20)]
    assert sorted(asked[:20]) == sorted(asked[20:]) == list(range(20))
    assert asked[:20] != asked[20:]
    assert prompt_numbers(3, 1, 20, 20) != prompt_numbers(4, 1, 20, 20)


def test_a_step_may_ask_more_prompts_than_there_are():
    assert sorted(prompt_numbers(0, 1, 32, 16)) == sorted(list(range(16)) * 2)


def test_ranks_share_every_update_evenly():
    cfg = settings_for_share()
    ranks = [share(cfg, loop.parallel.World(r, 2, torch.device("cpu"), None)) for r in range(2)]
    assert ranks == [[0, 1, 4, 5], [2, 3, 6, 7]]


def settings_for_share():
    return config_file.override(Config(), ["--rollout.prompts", "8", "--algorithm.minibatch_prompts", "4"])


def test_the_learning_rate_rises_and_falls():
    cfg = config_file.override(Config(), ["--optim.warmup", "4", "--optim.schedule", "linear"])
    rates = [learning_rate(cfg, update, 10) for update in range(11)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4] == 1.0
    assert all(a > b for a, b in itertools.pairwise(rates[4:]))
    assert rates[10] == 0.0
    late = config_file.override(cfg, ["--optim.warmup", "0", "--optim.schedule", "wsd"])
    assert [learning_rate(late, update, 20) for update in (0, 15, 16, 18, 20)] == pytest.approx([1, 1, 1, 0.5, 0])
    constant = config_file.override(Config(), ["--optim.warmup", "0"])
    assert {learning_rate(constant, update, 10) for update in range(10)} == {1.0}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_row_of_the_family_trains(monkeypatch, tmp_path, preset):
    args = ["--algorithm.preset", preset, "--algorithm.minibatch_prompts", "2", "--run.steps", "1"]
    train_with(monkeypatch, tmp_path, lambda i: float(i % 3), *args, "--algorithm.beta", "1.0")
    (row,) = lines(tmp_path, "train")
    assert row["skipped"] == 0
    assert row["grad_norm"] > 0
