"""The order that a sampled backward cuts the vocabulary in: counted from responses, one for all, and worth it."""

import json

import numpy as np
import pytest
import tiny
import torch
import worker
from ranks import on_ranks
from safetensors.torch import load_file

from flowrl_kernels import Sampled, linear_logprob
from flowrl_kernels.testing import rl_like_inputs
from flowrl_kernels.trainer import checkpoint, objective
from flowrl_kernels.trainer import run as run_module
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.token_order import ONE, TokenOrder

V = 4000
PADDED = tiny.flags("model.vocab_multiple 512  parallel.share 0.2  optim.lr 1e-2  run.seed 2")


def sampled(*steps, size=8):
    """The order after steps of one response each."""
    made = TokenOrder(size)
    for ids in steps:
        made.add([np.array(ids)], tiny.ALONE)
    return made


def test_ids_sampled_most_come_first_and_those_as_often_by_id():
    assert sampled([5, 5, 5, 2, 7, 7]).order().tolist() == [5, 7, 2, 0, 1, 3, 4, 6]
    assert sampled().order().tolist() == list(range(8))


def test_what_was_sampled_long_ago_counts_for_less_and_a_little_for_ever():
    made = sampled([6, 6], *[[1]] * 30)
    share = made.counts[[6, 1]].double() / ONE
    assert share.tolist() == pytest.approx([2 * (31 / 32) ** 30, sum((31 / 32) ** i for i in range(30))], rel=1e-3)
    old = sampled([6, 6], *[[1]] * 2000)
    assert old.order()[:2].tolist() == [1, 6]
    assert 30.0 < int(old.counts[1]) / ONE < 32.01  # it does not grow without end


def count_on_ranks(rank, world):
    responses = [np.array([9, 4, 4]), np.array([4, 9, 9, 9, 2]), np.array([1, 1, 1, 1])]
    mine, whole = TokenOrder(12), TokenOrder(12)
    for _ in range(2):
        mine.add(responses[:1] if rank == 0 else responses[1:], World(rank, world, torch.device("cpu"), None))
        whole.add(responses, tiny.ALONE)
    assert torch.equal(mine.counts, whole.counts)
    assert mine.order()[:4].tolist() == [1, 9, 4, 2]


@pytest.mark.distributed
def test_every_rank_has_the_counts_of_all():
    on_ranks(count_on_ranks, 2)


def test_counts_of_another_head_are_refused():
    with pytest.raises(ValueError, match=r"counts: wanted int64 \[9\], a head's rows; got torch.int64 \[8\]"):
        TokenOrder(9, torch.zeros(8, dtype=torch.int64))


def peaked():
    """hidden, weight, target, grad of a synthetic peaked head whose likely ids lie anywhere, as a tokenizer's do."""
    hidden, weight, target, grad = rl_like_inputs(1024, 24, V, zipf=1.6)
    turn = torch.randperm(V, generator=torch.Generator().manual_seed(1))
    return hidden, weight[turn], turn.argsort()[target], grad


def errors(order, share=0.08, draws=6):
    """Relative error of both gradients of 192 rows over draws, root mean square; and what the reports estimate."""
    hidden, weight, target, grad = peaked()
    made, squares, told = [], [], []
    for i in range(draws + 1):
        x, w, report = hidden[:192].clone().requires_grad_(), weight.clone().requires_grad_(), torch.zeros(4)
        draw = {"sampled": Sampled(share, (i,), order=order), "report": report} if i else {}
        linear_logprob(x, w, target[:192], impl="chunked", **draw).logp.backward(grad[:192])
        made.append(torch.cat([x.grad.flatten(), w.grad.flatten()]))
        squares.append(float((made[-1] - made[0]).norm() / made[0].norm()) ** 2)
        told.append(float(report[3]) ** 2)
    return [np.mean(found[1:]) ** 0.5 for found in (squares, told)]


def test_at_an_equal_share_a_draw_errs_far_less_in_the_order_of_what_was_sampled():
    made, target = TokenOrder(V), peaked()[2].numpy()
    for low in range(192, 1024, 208):  # other rows than those it is judged on
        made.add([target[low : low + 208]], tiny.ALONE)
    by_id, in_order = errors(None), errors(made.order())
    for one, other in zip(by_id, in_order):  # synthetic: 1.5 and .5 %
        assert 0.0 < other < 0.5 * one


@pytest.fixture
def everything_earns(monkeypatch):
    """Rewards of many sizes: next to nothing that is drawn from a padded vocabulary is text."""

    class Many(run_module.Scorer):
        def score(self, problems, responses):
            return [37 * i % 97 / 97 for i in range(len(responses))]

    monkeypatch.setattr(worker, "Digits", Many)


def run(tmp_path, name, steps, *args):
    where = ["--run.dir", str(tmp_path / name), "--run.cache", str(tmp_path / "cache"), "--run.steps", str(steps)]
    seen = worker.record([*tiny.SMALL, *PADDED, *where, *args])
    assert all(gradient.norm() > 0 for gradient in seen["gradients"])
    rows = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
    return seen, [row["dlogits_error_estimate"] for row in rows if row["kind"] == "train"]


def test_a_resumed_run_cuts_the_vocabulary_as_one_that_was_never_stopped(tmp_path, everything_earns, monkeypatch):
    whole, errors = run(tmp_path, "whole", 3)
    run(tmp_path, "parts", 2)
    path = checkpoint.latest(tmp_path / "parts")
    counts = checkpoint.counts(path)
    assert int(counts.sum()) > 2 * 16 * ONE
    rest, more = run(tmp_path, "parts", 3, "--run.resume", "True")
    assert more == errors
    assert torch.equal(rest["gradients"][0], whole["gradients"][2])
    assert load_file(path / checkpoint.COUNTS).keys() == {"counts"}
    log = tmp_path / "parts" / "metrics.jsonl"
    assert "no counts" not in log.read_text()
    monkeypatch.setattr(checkpoint, "counts", lambda path: None)  # as an older version's checkpoint
    run(tmp_path, "parts", 4, "--run.resume", "True")
    assert "step_3 has no counts of sampled tokens: their order starts anew" in log.read_text()


@pytest.mark.parametrize("algorithm", ["flowrl", "grpo"])
def test_old_log_probs_and_those_of_the_first_update_are_summed_in_one_order(
    tmp_path, algorithm, everything_earns, monkeypatch
):
    partial_of, seen = objective.partial_of, []
    monkeypatch.setattr(objective, "partial_of", lambda *given: seen.append(partial_of(*given)) or seen[-1])
    several = tiny.flags(f"algorithm.name {algorithm}  algorithm.minibatch_prompts 2  optim.warmup 0")
    first, second = run(tmp_path, algorithm, 1, *several)[0]["weights"]
    assert first.eq(1.0).all()
    assert not second.eq(1.0).all()
    wanted = TokenOrder(512, checkpoint.counts(checkpoint.latest(tmp_path / algorithm))).order()
    assert len(seen) >= 2
    assert all(torch.equal(partial.sampled.order, wanted) for partial in seen)
    assert not torch.equal(wanted, torch.arange(512))


def test_an_exact_run_counts_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(TokenOrder, "add", None)
    where = tiny.flags(f"run.dir {tmp_path / 'run'}  run.cache {tmp_path / 'cache'}  run.steps 1")
    worker.record([*tiny.SMALL, *where])
    assert checkpoint.counts(checkpoint.latest(tmp_path / "run")) is None
