"""The held-out cells: a plan that a seed, a dial and a split follow from, a runner that resumes, exact figures."""

import json
import math
import re

import pytest
import torch

from benchmarks.evidence import held_out, held_out_numbers, numbers, plan
from benchmarks.evidence.held_out import ALGORITHM, KS
from flowrl_kernels import flowrl_loss, policy_gradient_loss
from flowrl_kernels.advantages import leave_one_out
from flowrl_kernels.trainer import algorithms, checks, config_file, parallel, policy
from flowrl_kernels.trainer.config import check
from flowrl_kernels.trainer.parts import make_text
from flowrl_kernels.trainer.suites.figures import t_quantile
from flowrl_kernels.trainer.tasks import build_task

DIALS = {method: dials[0] for method, dials in plan.HELD_OUT.items()}


def result(found=0.5, right=0.2):
    return {"found_in_128": found, "pass": {"1": right}, "seconds": 1.0}


def test_every_method_has_three_dials_and_no_seed_or_split_serves_twice():
    validation, test = plan.held_out_validation(), plan.held_out_test(DIALS)
    assert (len(validation), len(test)) == (15, 15)
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
        third = cell.dial == plan.HELD_OUT[cell.method][2]
        return result(0.9 if third else 0.1, 0.4 if third == (cell.method == "tb") else 0.1)

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            held_out.fill(path, tmp_path, 1.0, one)
    assert held_out.fill(path, tmp_path, 1.0, one) == (42, 42)
    assert [cell.split for cell in asked] == ["valid"] * 16 + ["test"] * 28
    assert len({cell.key() for cell in asked}) == 42  # but for the two that were cut off, none ran twice
    thirds = {method: dials[2] for method, dials in plan.HELD_OUT.items()}
    firsts = {method: dials[0] for method, dials in plan.HELD_OUT.items()}
    made = json.loads(path.read_text())
    assert made["chosen"] == {"found_in_128": thirds, "pass_1": firsts | {"tb": 2.0}}
    assert {cell.dial for cell in asked if cell.method == "tb" and cell.split == "test"} == {2.0}  # one for both aims
    assert held_out.fill(path, tmp_path, 0.0, one) == (42, 42)
    assert len(asked) == 44


def test_results_that_are_whole_start_no_process_of_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(held_out, "forked", None)
    assert held_out.make(held_out.OUT, tmp_path, 1.0) == (45, 45)


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


def test_a_response_has_the_probability_that_the_model_gives_it_token_by_token():
    tables = {
        "task": {"numbers": 2, "min_solutions": 1, "held_out": 5},
        "model": {"hidden": 16, "layers": 1, "ffn": 32},
    }
    config = config_file.merge(config_file.load(held_out.SETTINGS), tables)
    task = build_task(config.task)
    text = make_text(config, task)
    torch.manual_seed(0)
    model = policy.build_model(config, text.tokenizer, "sdpa")
    actor = policy.make_policy(config, parallel.ALONE, model)
    pairs = [(problem, answer) for problem in task.problems("valid") for answer, _ in task.correct_texts(problem)]
    found = held_out.masses(config, parallel.ALONE, actor, text, pairs)
    assert len(found) > 5
    for (problem, answer), p in zip(pairs, found):
        start = text.encode(problem)
        ids = start + text.tokenizer(answer, add_special_tokens=False)["input_ids"] + [text.tokenizer.eos_token_id]
        with torch.no_grad():
            logp = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        by_hand = sum(float(logp[at - 1, ids[at]]) for at in range(len(start), len(ids)))
        assert p == pytest.approx(math.exp(by_hand), rel=1e-3)


def test_an_interval_over_seeds_and_problems_is_never_inside_that_of_either_alone():
    seeds, problems = [0.1, 0.3, 0.2], [0.0, 0.5, 1.0, 0.5]
    both = held_out_numbers.over_both([[s + p for p in problems] for s in seeds])
    assert both.mean == pytest.approx(0.7)
    variance = 0.01 / 3 + (0.5 / 3) / 4  # by hand: of the seeds' effects, then of the problems'
    freedom = variance**2 / ((0.01 / 3) ** 2 / 2 + (0.5 / 3 / 4) ** 2 / 3)
    assert both.half == pytest.approx(t_quantile(0.975, int(freedom)) * math.sqrt(variance))
    assert both.half > held_out_numbers.over_both([problems] * 3).half
    assert held_out_numbers.over_both([[1.0, 1.0], [1.0, 1.0]]) == (1.0, 0.0)


def test_the_cells_that_are_kept_are_those_of_the_plan_and_their_figures_agree_with_the_trainers_own():
    made = held_out.made_so_far(held_out.OUT)
    assert made["chosen"] == held_out.chosen(made)
    assert set(made["cells"]) == {cell.key() for cell in held_out.cells_of(made)}
    gaps = []
    for result in made["cells"].values():
        assert len(result["accuracy_of"]) == len(result["distinct_at_128_of"]) == len(result["solutions_of"])
        assert result["pass"]["1"] == pytest.approx(held_out.mean(result["accuracy_of"]), abs=1e-4)
        gaps.append(result["sampled_accuracy"] - result["pass"]["1"])
    # the trainer's: two responses to each of 200 problems, deviation at most .025 in one cell
    assert max(map(abs, gaps)) < 0.1
    assert abs(held_out.mean(gaps)) < 0.03


def test_each_interval_in_the_pages_words_is_one_that_the_results_give():
    made, known = held_out.made_so_far(held_out.OUT), set()
    for aim in plan.HELD_OUT_AIMS:
        plain = held_out_numbers.tests_of(made, aim, "tb")
        for method in plan.HELD_OUT:
            results = held_out_numbers.tests_of(made, aim, method)
            for figure in (held_out_numbers.passed(1), held_out_numbers.found):
                known.add(held_out_numbers.gap(results, plain, figure).text())
                known.add(held_out_numbers.gained(results, made["starts"]["test"], figure).text())
    section = numbers.PAGE.read_text().partition("**Held-out Countdown**")[2].partition("## What was done")[0]
    words = " ".join(line for line in section.splitlines() if not line.startswith("|"))
    told = re.findall(r"-?\.\d+ ± +\.\d+", words)
    assert len(told) > 10
    assert {re.sub(" +", " ", one) for one in told} <= known
