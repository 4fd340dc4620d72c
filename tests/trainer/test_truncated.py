"""Training on truncated draws: ratios over the kept tokens, and what is refused."""

import pytest
import tiny
import torch

from flowrl_kernels.trainer import config as configs
from flowrl_kernels.trainer import config_file, loop, parallel, shaping
from flowrl_kernels.trainer import run as runs
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.records import Progress
from flowrl_kernels.trainer.rollout.hf import HFEngine


def prepared(tmp_path, text):
    args = [*tiny.SMALL, *tiny.flags(text), "--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "cache")]
    return runs.prepare(config_file.override(Config(), args), parallel.ALONE)


def first_minibatch(run, replay=True):
    """pi / pi_sampler of each token before anything was learned, with the trainer's log-probs over the kept tokens
    or over all."""
    rollouts = loop.collect(run, Progress())
    rollouts.reward = [0.0, 1.0] * (len(rollouts.texts) // 2)
    updates = loop.pack_updates(run, rollouts, shaping.shape(run.config, rollouts, run.world))
    batches = [batch for update in updates for batch in update.batches]
    for batch in batches:
        batch.kept = batch.kept if replay else None
    loop.score(run, run.policy, batches, "old")
    gaps = torch.cat([batch.per_token["old"] - batch.per_token["sampler"] for batch in batches])
    return gaps.exp(), batches


def outside(ratio):
    return float(((ratio < 0.9) | (ratio > 1.1)).double().mean())


def test_replay_of_the_kept_tokens_brings_the_first_ratios_back_to_one(tmp_path):
    sizes = "rollout.prompts 16  rollout.samples 8"
    shares = {}
    for name, top_p, replay in (("with replay", 0.8, True), ("without", 0.8, False), ("untruncated", 1.0, True)):
        run = prepared(tmp_path / name, f"{sizes}  rollout.top_p {top_p}")
        ratio, _ = first_minibatch(run, replay)
        shares[name] = outside(ratio)
        if name != "without":
            torch.testing.assert_close(ratio, torch.ones_like(ratio), rtol=0, atol=1e-5)
        else:
            assert ratio.max() <= 1 + 1e-5  # the mass of the kept tokens, by which the sampler divides
    print("share of first ratios outside [0.9, 1.1]:", shares)
    assert shares["without"] > 0.2
    assert shares["with replay"] == shares["untruncated"] == 0.0


@pytest.mark.parametrize("name", ["flowrl", "grpo"])
def test_the_weight_of_the_first_update_over_kept_tokens_is_one_to_the_bit(tmp_path, name):
    run = prepared(tmp_path, f"algorithm.name {name}  algorithm.minibatch_prompts 2  rollout.top_p 0.8")
    _, batches = first_minibatch(run)
    if run.reference is not None:
        loop.score(run, run.reference, batches, "ref")
    shaping.finish(run.config, batches, run.world)
    out = run.policy(run.loss(batches[0], tokens=9, sequences=3, update=1), batches[0].ids, batches[0].positions)
    assert batches[0].kept is not None
    assert out.weight.eq(1.0).all()


def test_an_engine_that_does_not_tell_what_it_kept_is_refused(tmp_path, monkeypatch):
    run = prepared(tmp_path / "silent", "rollout.top_k 3")
    generate = HFEngine.generate
    monkeypatch.setattr(HFEngine, "generate", lambda *args: generate(*args)._replace(kept=None))
    with pytest.raises(RuntimeError, match=r"rollout\.engine: 'hf' did not return the tokens"):
        loop.collect(run, Progress())
    monkeypatch.setattr(configs, "TELLS_KEPT", ())
    for text, key in (("top_p 0.9", "top_p: wanted 1.0"), ("top_k 3", "top_k: wanted 0"), ("min_p 0.1", "min_p: want")):
        with pytest.raises(ValueError, match=rf"rollout\.{key}.*'hf' does not return the tokens it kept"):
            prepared(tmp_path / "before", f"rollout.{text}")
