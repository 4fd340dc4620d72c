"""The held-out cells: a plan that a seed, a dial and a split follow from, a runner that resumes, exact figures."""

import json
import math

import pytest
import torch

from benchmarks.evidence import held_out, plan
from benchmarks.evidence.held_out import ALGORITHM, KS
from flowrl_kernels import flowrl_loss, policy_gradient_loss
from flowrl_kernels.advantages import leave_one_out
from flowrl_kernels.trainer import algorithms, checks, config_file
from flowrl_kernels.trainer.config import check

DIALS = {method: dials[1] for method, dials in plan.HELD_OUT.items()}


def result(found=0.5):
    return {"found_in_128": found, "seconds": 1.0}


def test_every_method_has_three_dials_and_no_seed_or_split_serves_twice():
    validation, test = plan.held_out_validation(), plan.held_out_test(DIALS)
    assert len(validation) == len(test) == 15
    assert {cell.split for cell in validation} == {"valid"}
    assert {cell.split for cell in test} == {"test"}
    assert not {cell.seed for cell in validation} & {cell.seed for cell in test}
    for method in plan.HELD_OUT:
        assert len({cell.dial for cell in validation if cell.method == method}) == 3
        assert {cell.seed for cell in test if cell.method == method} == {0, 1, 2}
    assert len({cell.key() for cell in validation + test}) == 30


def test_cells_differ_in_seed_and_algorithm_alone_and_only_test_cells_can_see_the_test_split(tmp_path):
    made = {}
    for cell in (*plan.held_out_validation(), *plan.held_out_test(DIALS)):
        config = held_out.settings(cell, tmp_path)
        check(config)
        checks.check_algorithm(config)
        assert (config.task.name == "countdown") == (cell.split == "test")
        flat = config_file.flat(config)
        own = {"run.dir", "run.seed", "task.name"}
        made[cell] = {k: v for k, v in flat.items() if k not in own and not k.startswith("algorithm.")}
        assert not algorithms.of(config).critic
    assert len({json.dumps(rest, sort_keys=True, default=str) for rest in made.values()}) == 1
    closed = held_out.without_test(
        config_file.merge(config, {"task": {"numbers": 2, "min_solutions": 1, "held_out": 5}}).task
    )
    assert closed.problems("test") == []
    assert len(closed.problems("valid")) == 5


def test_what_is_there_is_not_run_again_and_the_test_split_waits_for_every_dial(tmp_path):
    path, asked = tmp_path / "made.json", []

    def one(cell, scratch):
        asked.append(cell)
        if len(asked) in (4, 20):
            raise KeyboardInterrupt
        return result(0.9 if cell.dial == plan.HELD_OUT[cell.method][2] else 0.1)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            held_out.fill(path, tmp_path, 1.0, one)
    assert held_out.fill(path, tmp_path, 1.0, one) == (30, 30)
    assert [cell.split for cell in asked] == ["valid"] * 16 + ["test"] * 16
    assert len({cell.key() for cell in asked}) == 30  # but for the two that were cut off, none ran twice
    made = json.loads(path.read_text())
    assert made["chosen"] == {method: dials[2] for method, dials in plan.HELD_OUT.items()}
    assert {cell.dial for cell in asked if cell.method == "tb" and cell.split == "test"} == {10.0}
    assert held_out.fill(path, tmp_path, 0.0, one) == (30, 30)
    assert len(asked) == 32


def test_on_a_fresh_batch_the_preset_tba_has_the_gradient_of_rloo_with_the_kl_in_its_reward():
    draws = torch.Generator().manual_seed(0)
    weight, size = 0.2, 4
    logp = torch.randn(8, 5, dtype=torch.float64, generator=draws).requires_grad_()
    ref = torch.randn(8, 5, dtype=torch.float64, generator=draws)
    reward = torch.tensor([1, 0, 0, 1, 0, 0, 0, 1], dtype=torch.float64)
    groups = torch.arange(8) // size
    chosen = ALGORITHM["rloo_kl_in_reward"](weight)
    out = flowrl_loss(logp, ref, reward, groups=groups, preset=chosen["preset"], beta=chosen["beta"])
    (ours,) = torch.autograd.grad(out.loss, logp)
    paid = leave_one_out(reward - weight * (logp.detach() - ref).sum(-1), groups)
    loss = policy_gradient_loss(logp, None, paid, ratio="none", aggregate="seq-mean-token-sum").loss
    (rloo,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(ours, rloo * 2 * (size - 1) / (size * weight))


def test_one_of_k_is_the_sum_over_what_k_responses_can_be():
    p = 0.3
    for k in (1, 2, 3):
        by_hand = sum(math.comb(k, i) * p**i * (1 - p) ** (k - i) for i in range(1, k + 1))
        assert held_out.at_least_one(p, k) == pytest.approx(by_hand, rel=1e-12)
    assert held_out.at_least_one(1e-12, 128) == pytest.approx(1.28e-10, rel=1e-6)
    assert held_out.at_least_one(1.0, KS[0]) == pytest.approx(1.0)
