"""Checkpoints: all or nothing, the newest few, from the run's own folder."""

import json
import random
import resource
import shutil
import signal

import numpy as np
import pytest
import tiny
import torch

from flowrl_kernels.trainer import checkpoint
from flowrl_kernels.trainer import policy as policies


def trained(seed=0):
    """A policy that has made one update, and its optimiser."""
    cfg = tiny.config(run={"seed": seed})
    policy = policies.make_policy(cfg, tiny.ALONE, tiny.model(cfg), log_z=True, value=True)
    optimizer = torch.optim.AdamW([{**group, "base_lr": group["lr"]} for group in policy.groups(cfg)], fused=True)
    for p in policy.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    optimizer.step()
    return policy, optimizer


def states(policy, optimizer):
    flat = {f"{i}.{k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    return {**policy.state_dict(), **flat}


def save(run, step, policy, optimizer, keep=2):
    return checkpoint.save(run, step, policy, optimizer, {"step": step}, tiny.ALONE, keep)


def test_everything_comes_back_to_the_bit(tmp_path):
    policy, optimizer = trained()
    torch.manual_seed(5), random.seed(6), np.random.seed(7)
    path = save(tmp_path, 3, policy, optimizer)
    want = torch.rand(3), random.random(), np.random.rand()
    other, fresh = trained(seed=1)
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    progress = checkpoint.load(path, tmp_path, other, fresh, tiny.ALONE)
    assert progress["step"] == 3
    got = torch.rand(3), random.random(), np.random.rand()
    assert torch.equal(got[0], want[0])
    assert got[1:] == want[1:]
    a, b = states(policy, optimizer), states(other, fresh)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in optimizer.param_groups]


def test_the_newest_few_stay(tmp_path):
    policy, optimizer = trained()
    for step in (1, 2, 10):
        save(tmp_path, step, policy, optimizer)
    assert sorted(p.name for p in checkpoint.folder(tmp_path).iterdir()) == ["step_10", "step_2"]
    assert checkpoint.latest(tmp_path).name == "step_10"


def test_what_was_half_written_is_not_a_checkpoint(tmp_path):
    policy, optimizer = trained()
    path = save(tmp_path, 1, policy, optimizer)
    shutil.copytree(path, path.with_name("step_2.incomplete"))
    assert checkpoint.latest(tmp_path) == path
    assert save(tmp_path, 2, policy, optimizer).name == "step_2"  # and is in nobody's way


# torch 2.15 under Python 3.13: a stream of its own is flushed once more when it is collected
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(tmp_path):
    policy, optimizer = trained()
    path = save(tmp_path, 1, policy, optimizer)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))  # every write past 10 kB fails
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"step 2 was not written .*older ones are intact"):
            save(tmp_path, 2, policy, optimizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in checkpoint.folder(tmp_path).iterdir()] == ["step_1"]
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before
    assert save(tmp_path, 2, policy, optimizer).name == "step_2"


def test_only_the_runs_own_checkpoints_are_loaded(tmp_path):
    policy, optimizer = trained()
    path = save(tmp_path / "theirs", 1, policy, optimizer)
    with pytest.raises(ValueError, match="not in the run folder"):
        checkpoint.load(path, tmp_path / "ours", policy, optimizer, tiny.ALONE)
    with pytest.raises(ValueError, match="not in the run folder"):
        checkpoint.load_model(path, tmp_path / "ours", policy)
    (tmp_path / "ours" / "checkpoints").mkdir(parents=True)
    (tmp_path / "ours" / "checkpoints" / "step_1").symlink_to(path)
    with pytest.raises(ValueError, match="not in the run folder"):
        checkpoint.load(checkpoint.latest(tmp_path / "ours"), tmp_path / "ours", policy, optimizer, tiny.ALONE)


def test_logs_are_cut_back_to_what_they_were_at_the_checkpoint(tmp_path):
    policy, optimizer = trained()
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n')
    path = save(tmp_path, 1, policy, optimizer)
    with log.open("a") as file:
        file.write('{"step": 1, "kind": "final"}\n{"step": 2}\n{"st')
    checkpoint.truncate(log, checkpoint.log_size(path, log.name))
    assert [json.loads(line) for line in log.read_text().splitlines()] == [{"step": 1}]
    checkpoint.truncate(tmp_path / "none.jsonl", 0)
