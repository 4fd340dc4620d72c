"""Ranks and splits: the same samples and the same gradient however the work is divided."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import worker

HERE = Path(__file__).parent
SMALL = [*tiny.SMALL, *tiny.flags("model.layers 2  rollout.prompts 8  run.steps 1  optim.warmup 0")]


def alone(tmp_path, *args):
    return worker.record([*SMALL, "--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "c"), *args])


def spread(tmp_path, ranks, *args):
    """The same run under torchrun."""
    tmp_path.mkdir()
    out = tmp_path / "seen.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(HERE / "worker.py"), str(out), *SMALL, "--run.dir", str(tmp_path / "run")]
    command += ["--run.cache", str(tmp_path / "c"), *args]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-4000:]
    return torch.load(out, weights_only=True)


def assert_same(actual, expected):
    """Relative difference at most 1e-5, where 1.02 of the right answer, or none, is far off."""
    assert expected.norm() > 1e-4
    assert (actual - expected).norm() <= 1e-5 * expected.norm()


ALGORITHMS = {
    "flowrl": [],
    "flowrl group": ["--algorithm.log_z", "group"],
    "grpo": ["--algorithm.name", "grpo", "--algorithm.kl", "0.1"],
    "dr_grpo": ["--algorithm.name", "dr_grpo"],
    "ppo": ["--algorithm.name", "ppo"],
    "reinforce_pp": ["--algorithm.name", "reinforce_pp"],
}


OFTEN = ("flowrl", "grpo", "ppo")  # the others share their code, and run nightly


@pytest.mark.parametrize("name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.nightly) for n in ALGORITHMS])
def test_the_gradient_is_the_same_for_any_split_into_micro_batches(tmp_path, name):
    whole = alone(tmp_path / "a", *ALGORITHMS[name])
    for i, split in enumerate((["20", "0"], ["64", "16"])):
        sizes = ["--parallel.max_tokens", split[0], "--parallel.row_tokens", split[1]]
        parts = alone(tmp_path / str(i), *ALGORITHMS[name], *sizes)
        assert_same(parts["gradients"][0], whole["gradients"][0])


def test_recomputed_activations_change_no_gradient(tmp_path):
    plain = alone(tmp_path / "a")
    recomputed = alone(tmp_path / "b", "--parallel.checkpoint_activations", "True")
    assert_same(recomputed["gradients"][0], plain["gradients"][0])


def test_bfloat16_trains_on_float32_master_weights(tmp_path):
    plain = alone(tmp_path / "a")
    half = alone(tmp_path / "b", "--parallel.dtype", "bfloat16")
    ours, theirs = half["gradients"][0], plain["gradients"][0]
    assert ours.shape == theirs.shape
    cosine = ours @ theirs / (ours.norm() * theirs.norm())
    assert 0.9 < cosine < 1 - 1e-7  # the same direction, by other arithmetic


TIED = "a replica on each, tied head"
CASES = {
    "sharded": ("flowrl", [], []),
    TIED: ("grpo", ["--model.tied", "True"], ["--parallel.replicate", "2"]),
}


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["sharded", pytest.param(TIED, marks=pytest.mark.nightly)])
def test_two_ranks_have_the_gradients_of_one_which_can_resume_their_run(tmp_path, case):
    name, args, mesh = CASES[case]
    args = [
        *ALGORITHMS[name],
        *args,
        "--algorithm.minibatch_prompts",
        "4",
        "--parallel.max_tokens",
        "40",
        "--run.seed",
        "2",
    ]
    one = alone(tmp_path / "one", *args)
    two = spread(tmp_path / "two", 2, *args, *mesh)
    more = ["--run.steps", "2", "--run.resume", "True", "--parallel.replicate", "1"]
    one_more = alone(tmp_path / "one", *args, *more)
    two_more = alone(tmp_path / "two", *args, *more)
    ours, theirs = ([g for seen in pair for g in seen["gradients"]] for pair in ((two, two_more), (one, one_more)))
    assert len(ours) == len(theirs) == 4
    for mine, other in zip(ours[:2], theirs[:2]):
        assert_same(mine, other)
    for mine, other in zip(ours[2:], theirs[2:]):  # Adam divides by roots of squares: rounding has grown
        assert (mine - other).norm() <= 1e-3 * other.norm()
    assert two["final"]["accuracy"] == one["final"]["accuracy"]


@pytest.mark.parametrize("name", ["flowrl", "grpo"])
def test_the_first_update_has_weights_of_exactly_one(tmp_path, name):
    seen = alone(tmp_path, *ALGORITHMS[name], "--algorithm.minibatch_prompts", "4", "--parallel.max_tokens", "50")
    first, second = seen["weights"]
    assert first.eq(1.0).all()
    assert not second.eq(1.0).all()
