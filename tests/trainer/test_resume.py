"""Resuming: the same numbers as a run that was never stopped, also after a kill in mid-step."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny

from flowrl_kernels.trainer import checkpoint, config_file, loop
from flowrl_kernels.trainer.config import Config

SMALL = [*tiny.SMALL, *tiny.flags("warm.steps 20  warm.batch 32  optim.lr 1e-2")]
CLOCK = ("time/", "tokens_per_s")


def arguments(tmp_path, name, *args):
    return [*SMALL, "--run.dir", str(tmp_path / name), "--run.cache", str(tmp_path / "cache"), *args]


def train(tmp_path, name, *args):
    return loop.train(config_file.override(Config(), arguments(tmp_path, name, *args)))


def numbers(tmp_path, name):
    """Every logged number that is no clock, by line."""
    rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in row.items() if not key.startswith(CLOCK)}
        for row in rows
        if row["kind"] in ("train", "eval", "final")
    ]


@pytest.mark.parametrize("algorithm", [["--algorithm.minibatch_prompts", "2"], ["--algorithm.name", "ppo"]])
def test_three_steps_and_three_resumed_are_the_six_of_one_run(tmp_path, algorithm):
    want = train(tmp_path, "whole", "--run.steps", "6", *algorithm)
    train(tmp_path, "parts", "--run.steps", "3", *algorithm)
    got = train(tmp_path, "parts", "--run.steps", "6", "--run.resume", "True", *algorithm)
    assert got == want
    assert numbers(tmp_path, "parts") == numbers(tmp_path, "whole")


def test_resuming_a_finished_run_repeats_its_evaluation_and_nothing_else(tmp_path):
    want = train(tmp_path, "run", "--run.steps", "2")
    before = numbers(tmp_path, "run")
    assert train(tmp_path, "run", "--run.steps", "2", "--run.resume", "True") == want
    assert numbers(tmp_path, "run") == before


def test_resuming_with_other_numbers_is_refused_by_field(tmp_path):
    train(tmp_path, "run", "--run.steps", "1")
    with pytest.raises(ValueError, match=r"run\.resume: .*optim\.lr: 0\.01 -> 0\.5"):
        train(tmp_path, "run", "--run.steps", "2", "--run.resume", "True", "--optim.lr", "0.5")


@pytest.mark.parametrize(
    ("last", "every", "moments"), [(8, 2, (5,)), pytest.param(40, 4, (6, 15, 27), marks=pytest.mark.nightly)]
)
def test_a_killed_run_ends_with_the_numbers_of_one_that_was_not(tmp_path, last, every, moments):
    """SIGKILL at moments that fall into steps, evaluations and checkpoints as they may."""
    settings = ["--run.steps", str(last), "--checkpoint.every", str(every), "--eval.every", str(2 * every + 2)]
    want = train(tmp_path, "whole", *settings)
    file = tmp_path / "empty.toml"
    file.write_text("")
    command = [sys.executable, "-m", "flowrl_kernels.trainer", "train", str(file)]
    command += arguments(tmp_path, "killed", *settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run, resume = tmp_path / "killed", []
    for steps in moments:
        process = subprocess.Popen([*command, *resume], env=environment, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while _last_step(run) < steps and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert process.poll() is None, "the run ended before it was killed"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert checkpoint.latest(run) is not None
        resume = ["--resume"]
    done = subprocess.run([*command, *resume], env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:]
    assert numbers(tmp_path, "killed") == numbers(tmp_path, "whole")
    assert numbers(tmp_path, "killed")[-1] == {"step": last, "kind": "final", **want}


def _last_step(run: Path) -> int:
    """The newest step in the log, 0 before there is one."""
    try:
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return 0
    return max([row["step"] for row in rows if row["kind"] == "train"], default=0)
