"""Sampling the next batch while this one trains: which weights sample what, the ratio to them, kills, failures."""

import copy
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fake_vllm
import pytest
import tiny
import torch
import worker

from flowrl_kernels.trainer import checkpoint, checks, config_file, loop, overlap, parallel
from flowrl_kernels.trainer import run as runs
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.objective import score_head
from flowrl_kernels.trainer.records import Progress
from flowrl_kernels.trainer.rollout import faults
from flowrl_kernels.trainer.rollout.faults import EngineError

CLOCK = ("time/", "tokens_per_s")
WORKER = Path(worker.__file__)
# a policy that moves: rewards that random responses earn (worker.Digits), a rate at which an update shows
LEARNS = tiny.flags("optim.lr 1e-2  optim.warmup 0  run.steps 3")


@pytest.fixture(autouse=True)
def digits(monkeypatch):
    monkeypatch.setattr(runs, "Scorer", worker.Digits)


@pytest.fixture
def server():
    fake = fake_vllm.of_sums()
    yield fake
    if fake.server is not None:
        fake.kill()


def arguments(tmp_path, name, server, bound, *more):
    return [*fake_vllm.small(server.address, *LEARNS), "--rollout.overlap", str(bound), *more,
            "--run.dir", str(tmp_path / name), "--run.cache", str(tmp_path / "cache")]  # fmt: skip


def train(tmp_path, name, server, bound, *more):
    """A run's logged numbers that are no clock."""
    loop.train(config_file.override(Config(), arguments(tmp_path, name, server, bound, *more)))
    return numbers(tmp_path / name)


def numbers(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {key: value for key, value in row.items() if not key.startswith(CLOCK)}
        for row in rows
        if row["kind"] in ("train", "eval", "final")
    ]


def asked(server):
    """(seed of the first response, tokens of the prompt) of every training prompt that was asked for, in order."""
    every = [(body["sampling_params"], tuple(body["token_ids"])) for body in server.asked]
    return [(params["seed"], tokens) for params, tokens in every if params["n"] == 4]


@pytest.mark.parametrize(
    ("bound", "more", "behind"),
    [
        (1, "algorithm.minibatch_prompts 2", [0, 1, 1]),
        (2, "algorithm.minibatch_prompts 2", [0, 2, 2]),
        pytest.param(1, "", [0, 1, 1], marks=pytest.mark.nightly),
        pytest.param(3, "algorithm.minibatch_prompts 2  algorithm.epochs 2  algorithm.name ppo", [0, 3, 3],
                     marks=pytest.mark.nightly),
    ],
)  # fmt: skip
def test_every_batch_is_as_far_behind_as_the_bound_says_and_asks_what_it_would_without(
    tmp_path, server, bound, more, behind
):
    more = tiny.flags(more)
    train(tmp_path, "after", server, 0, *more)
    without = asked(server)
    lines = [row for row in train(tmp_path, "ahead", server, bound, *more) if row["kind"] == "train"]
    assert [row["staleness"] for row in lines] == behind
    ahead = asked(server)[len(without) :]
    # one step's four prompts after the other's; within a step they may overtake each other
    assert [set(ahead[i : i + 4]) for i in (0, 4, 8)] == [set(without[i : i + 4]) for i in (0, 4, 8)]
    assert len(ahead) == len(without) == 12
    assert max(row["probe_gap"] for row in lines) < 1e-5
    assert lines[0]["mismatch_max"] < 1e-5
    assert min(row["mismatch_max"] for row in lines[1:]) > 1e-3  # the weights that sampled are not those of now


def test_the_next_batch_is_sampled_while_this_one_trains_and_without_overlap_it_is_not(tmp_path, server, monkeypatch):
    prompts, apply, seen = [], loop.apply, []

    def waits(run, progress, update):
        end = time.monotonic() + (5.0 if run.config.rollout.overlap else 0.2)
        while len(asked(server)) - prompts[-1] < 4 * min(progress.step + 2, 3) and time.monotonic() < end:
            time.sleep(0.005)
        seen.append((len(asked(server)) - prompts[-1]) // 4)
        return apply(run, progress, update)

    monkeypatch.setattr(loop, "apply", waits)
    for bound in (1, 0):
        prompts.append(len(asked(server)))
        train(tmp_path, f"by{bound}", server, bound)
    assert seen == [2, 3, 3, 1, 2, 3]  # batches asked for by the time of each step's update


@pytest.mark.parametrize(
    ("algorithm", "correction"),
    [("flowrl", ""), ("ppo", "token_truncate"),
     *(pytest.param(*more, marks=pytest.mark.nightly)
       for more in (("ppo", ""), ("grpo", ""), ("flowrl", "token_truncate"), ("grpo", "token_truncate")))],
)  # fmt: skip
def test_the_ratio_is_to_the_weights_that_sampled_or_with_a_correction_to_those_of_the_steps_start(
    tmp_path, server, monkeypatch, algorithm, correction
):
    found, apply, before, weights = [], loop.apply, [], []

    def looks(run, progress, update):
        if progress.step:  # the second batch: sampled by the weights before the first update
            (batch,) = update.batches
            with torch.no_grad():
                for actor in (before[0], run.policy):
                    logp = actor(score_head(run.config, batch), batch.ids, batch.positions).logp
                    found.append(float((batch.per_token["old"] - logp).abs().max()))
        before.append(copy.deepcopy(run.policy))
        result = apply(run, progress, update)
        weights.append(max(float((out.weight - 1).abs().max()) for out, _ in result.outputs))
        return result

    monkeypatch.setattr(loop, "apply", looks)
    more = ["--algorithm.correction", correction] if correction else []
    train(tmp_path, "run", server, 1, "--run.steps", "2", "--algorithm.name", algorithm, *more)
    mine, other = found[::-1] if correction else found
    assert mine < 1e-5 < 1e-3 < other
    assert weights[0] < 1e-5  # at its start the first batch is of the policy itself
    if not correction:
        assert weights[1] > 1e-3


def test_a_killed_run_goes_on_with_the_batch_that_was_sampled_ahead_and_ends_with_the_same_bits(tmp_path, server):
    """SIGKILL in a step whose next batch is under way."""
    settings = ["--run.steps", "5", "--checkpoint.every", "2", "--eval.every", "4",
                "--algorithm.minibatch_prompts", "2"]  # fmt: skip
    want = train(tmp_path, "whole", server, 2, *settings)
    third, before = set(asked(server)[8:12]), len(asked(server))
    args = arguments(tmp_path, "killed", server, 2, *settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(WORKER), str(tmp_path / "out"), *args], env=environment, stdout=subprocess.DEVNULL
    )
    log, end = tmp_path / "killed" / "metrics.jsonl", time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end:
        if log.exists() and '"step": 3' in log.read_text():
            break
        time.sleep(0.002)
    assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    (last,) = checkpoint.whole(tmp_path / "killed")
    assert last.name == "step_2"
    assert [path.name for path in last.glob("ahead_*")] == ["ahead_0.safetensors"]
    killed = len(asked(server))
    assert third <= set(asked(server)[before:killed])
    loop.train(config_file.override(Config(), [*args, "--run.resume", "True"]))
    assert numbers(tmp_path / "killed") == want
    assert len(want) == 5 + 3
    # the third step's responses lay in the checkpoint; the fourth's and fifth's were sampled after it
    assert not third & set(asked(server)[killed:])
    assert len(asked(server)) - killed == 8


@pytest.mark.nightly
@pytest.mark.distributed
@pytest.mark.timeout(240)
def test_two_ranks_stay_together_with_batches_under_way_as_one_rank_does(tmp_path, server):
    settings = ["--algorithm.minibatch_prompts", "2", "--checkpoint.every", "2", "--run.threads", "1"]
    want = train(tmp_path, "one", server, 1, *settings)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(WORKER)]
    args = arguments(tmp_path, "two", server, 1, *settings)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*line, str(tmp_path / "out"), *args], env=environment, capture_output=True, timeout=180)
    assert done.returncode == 0, done.stderr[-3000:].decode()
    for one, two in zip(want, numbers(tmp_path / "two"), strict=True):
        for name in ("staleness", "reward", "loss", "entropy", "step"):
            if name in one:
                assert two[name] == pytest.approx(one[name], rel=1e-3), (one, two)


def test_another_number_of_ranks_finds_its_part_of_the_batch_ahead(tmp_path, server):
    run = runs.prepare(config_file.override(Config(), arguments(tmp_path, "run", server, 1)), parallel.ALONE)
    progress = Progress()
    prompts = loop.prompts_of(run, 1)
    overlap.ask(run, progress, prompts)
    whole = overlap.tensors(run)
    folder = checkpoint.folder(run.folder) / "step_0"
    folder.mkdir(parents=True)
    rows = {0: [0, 3], 1: [2, 1]}
    for rank, mine in rows.items():
        which = torch.tensor([i * 4 + j for i in mine for j in range(4)])
        part = {name: value[which] for name, value in whole.items() if name not in ("at", "numbers")}
        longest = int(part["length"].max())
        part |= {name: part[name][:, :longest].contiguous() for name in ("tokens", "logp")}
        part |= {"at": whole["at"], "numbers": torch.tensor(mine)}
        checkpoint.save_file(part, folder / f"ahead_{rank}.safetensors")
    run.saved, run.ahead = {"step": 0}, None
    overlap.restore(run, progress, [0, 1, 2, 3])
    assert all(torch.equal(value, overlap.tensors(run)[name]) for name, value in whole.items())
    overlap.restore(run, progress, [2])
    assert torch.equal(run.ahead.out.length, whole["length"][8:12])
    assert run.ahead.out.tokens.shape[1] == int(whole["length"][8:12].max())
    run.engine.close()


def test_a_server_that_fails_in_the_background_stops_the_run_behind_a_whole_step(tmp_path, server, monkeypatch):
    monkeypatch.setattr(faults.time, "sleep", lambda seconds: None)

    def overloaded(answer, handler):
        return 503, {"error": "overloaded"}

    server.faults = [None] * (4 + 4 + 4 + 4) + [overloaded] * 100  # the third step's prompts, asked during the second
    with pytest.raises(EngineError, match=r"answered 503.*\(tried 3 times\)"):
        train(tmp_path, "run", server, 1, "--rollout.retries", "2", "--algorithm.minibatch_prompts", "2")
    folder = tmp_path / "run"
    assert [row["step"] for row in numbers(folder)] == [1, 2]
    assert (folder / "checkpoints" / "step_2").is_dir()
    server.faults = []
    done = train(tmp_path, "run", server, 1, "--run.resume", "True", "--algorithm.minibatch_prompts", "2")
    lines = [row for row in done if row["kind"] == "train"]
    assert [row["step"] for row in lines] == [1, 2, 3]
    assert [row["staleness"] for row in lines] == [0, 1, 0]  # the third by the weights of the checkpoint


def test_responses_further_behind_than_the_bound_are_refused(tmp_path, server):
    run = runs.prepare(config_file.override(Config(), arguments(tmp_path, "run", server, 1)), parallel.ALONE)
    progress = Progress()
    overlap.ask(run, progress, loop.prompts_of(run, 2))
    progress.step, progress.updates = 1, 2
    with pytest.raises(EngineError, match=r"rollout\.overlap: responses of weights 0 .* at 2 updates; .* be 1 behind"):
        loop.collect(run, progress)
    run.engine.close()


def test_a_run_that_ends_does_not_wait_for_what_is_under_way(tmp_path, server):
    run = runs.prepare(config_file.override(Config(), arguments(tmp_path, "run", server, 1)), parallel.ALONE)
    slow = threading.Event()
    server.faults = [lambda answer, handler: (slow.wait(20), (200, answer))[1]] * 4
    overlap.ask(run, Progress(), loop.prompts_of(run, 1))
    began = time.monotonic()
    run.engine.close()
    with pytest.raises(EngineError, match="closed|over|cancelled"):
        run.ahead.wait()
    assert time.monotonic() - began < 5
    slow.set()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("rollout.overlap 1", r"rollout\.overlap: wanted 0, engine = 'hf' samples from the live weights"),
        ("rollout.engine vllm rollout.overlap 1", r"rollout\.overlap: wanted 0, engine = 'vllm' runs in the trainer's"),
        ("rollout.engine server rollout.servers http://a:1 rollout.overlap 2", r"wanted at most 1, the updates of a s"),
        ("rollout.engine server rollout.servers http://a:1 algorithm.minibatch_prompts 8 rollout.overlap 5", "most 4"),
    ],
)
def test_what_cannot_overlap_is_refused_by_name(args, said):
    with pytest.raises(ValueError, match=said):
        checks.check_engine(config_file.override(Config(), tiny.flags(args)), ranks=1)
