"""Micro-batches by a budget in memory: what is counted is what is kept, and no budget changes a gradient."""

import tiny
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from flowrl_kernels.trainer import budget, loop
from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.config_file import override


def made(**sections):
    cfg = tiny.config(**sections)
    return cfg, policies.make_policy(cfg, tiny.ALONE, tiny.model(cfg))


def test_a_token_costs_what_its_layers_keep():
    _, policy = made(model={"hidden": 32, "ffn": 48})
    each = budget.bytes_a_token(policy, tiny.ALONE)
    # at least, in each of two layers: the layer's input, q, k, v, what attention gives; gate, up, their product
    least = 4 * 2 * (5 * 32 + 3 * 48)
    assert least < each < 4 * least
    _, twice = made(model={"hidden": 32, "ffn": 48, "layers": 4})
    assert 1.8 < budget.bytes_a_token(twice, tiny.ALONE) / each < 2.0 + 1e-6
    _, again = made(parallel={"checkpoint_activations": True})
    assert budget.bytes_a_token(again, tiny.ALONE) < each / 3  # a layer's input alone


def test_a_budget_gives_the_tokens_that_fit_it_and_never_more_than_were_asked_for():
    cfg, policy = made(parallel={"max_tokens": 500, "row_tokens": 400})
    each = budget.bytes_a_token(policy, tiny.ALONE)
    for tokens, wanted in ((100.5, 100), (900, 500)):
        asked = tiny.config(parallel={"max_tokens": 500, "row_tokens": 400, "memory": tokens * each / 2**30})
        fit, (note,) = budget.fitted(asked, policy, tiny.ALONE)
        assert fit.parallel.max_tokens == wanted
        assert fit.parallel.row_tokens == min(400, wanted)
        assert f"micro-batches of {wanted} tokens" in note
    assert budget.fitted(cfg, policy, tiny.ALONE) == (cfg, [])


def run(folder, *more):
    flags = [*tiny.SMALL, "--run.steps", "1", "--run.dir", str(folder), "--run.cache", str(folder.parent / "cache")]
    seen = []

    def step(optimizer, *args, **kwargs):
        gradients = [p.grad.flatten() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        seen.append(torch.cat(gradients).clone())

    handle = register_optimizer_step_pre_hook(step)
    try:
        loop.train(override(Config(), [*flags, "--warm.steps", "0", "--task.name", "sums", *more]))
    finally:
        handle.remove()
    return seen, (folder / "metrics.jsonl").read_text()


def test_the_gradient_is_the_same_under_every_budget_and_with_shared_prompts(tmp_path):
    settings = tiny.flags("algorithm.log_z group  algorithm.reward raw  algorithm.beta 2  optim.max_grad_norm inf")
    settings += ["--task.reward", "rewards_for_tests:by_length", "--task.reward_workers", "1"]
    (want,), log = run(tmp_path / "whole", *settings)
    assert "micro-batches of" not in log
    assert want.norm() > 1e-3
    for name, more in {
        "few": ["--parallel.memory", "2e-5"],
        "shared": ["--parallel.share_prompts", "True"],
        "both": ["--parallel.memory", "2e-5", "--parallel.share_prompts", "True"],
    }.items():
        (got,), log = run(tmp_path / name, *settings, *more)
        assert ("micro-batches of" in log) == ("memory" in " ".join(more))
        assert (got - want).norm() < 2e-5 * want.norm(), name
