"""The exact figures of a run against the same sums over every response, from transformers' own logits in float64."""

import copy

import pytest
import tiny
import torch

from flowrl_kernels.trainer import config_file, loop
from flowrl_kernels.trainer.config import Config

PROBLEMS, BETA = 2, 4.0
SMALL = [
    *tiny.SMALL,
    *tiny.flags(f"run.steps 0  eval.exact True  eval.problems {PROBLEMS}  rollout.temperature 0.9  model.hidden 16"),
]


def figures(policy, run, beta, normalized):
    """exact_accuracy, exact_kl and log Z by enumeration: 1,000 answers of six tokens, and one lump for the rest."""
    accuracy, distance, partition = [], [], []
    for problem in run.task.problems("test")[:PROBLEMS]:
        answers = [f"{a}+{b}+{c}" for a in range(10) for b in range(10) for c in range(10)]
        right = torch.tensor([float(sum(map(int, t.split("+"))) == problem.answer) for t in answers]).double()
        prompt = run.text.encode(problem)
        ids, end = run.text.tokenizer(answers)["input_ids"], run.text.tokenizer.eos_token_id
        rows = torch.tensor([prompt + row + [end] for row in ids])
        with torch.no_grad():
            logits = policy.model(input_ids=rows, use_cache=False).logits[:, len(prompt) - 1 : -1] / 0.9
        logp = torch.log_softmax(logits, -1).gather(2, rows[:, len(prompt) :, None])[..., 0].sum(1)
        p = torch.cat([logp.exp(), 1 - logp.exp().sum()[None]])
        reward, length = torch.cat([right, torch.zeros(1)]), 6 if normalized else 1
        # the policy is still the reference: p exp(length beta r) / Z is the optimum
        total = (p * (length * beta * reward).exp()).sum()
        optimum = p * (length * beta * reward).exp() / total
        accuracy.append(float((p * reward).sum()))
        distance.append(float((p * (p / optimum).log()).sum()))
        partition.append(float(total.log() / length))
    return (sum(x) / PROBLEMS for x in (accuracy, distance, partition))


@pytest.mark.parametrize("preset", ["paper", "tb"])
def test_the_exact_figures_are_those_of_the_configured_target(monkeypatch, tmp_path, preset):
    kept = {}
    prepare = loop.prepare

    def keeping(config, world):
        kept["run"] = prepare(config, world)
        kept["policy"] = copy.deepcopy(kept["run"].policy).double()
        return kept["run"]

    monkeypatch.setattr(loop, "prepare", keeping)
    args = [*SMALL, "--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "cache")]
    args += tiny.flags(f"algorithm.preset {preset}  algorithm.beta {BETA}")
    final = loop.train(config_file.override(Config(), args))
    accuracy, distance, log_z = figures(kept["policy"], kept["run"], BETA, normalized=preset == "paper")
    assert final["exact_accuracy"] == pytest.approx(accuracy, rel=1e-4)
    assert final["exact_kl"] == pytest.approx(distance, rel=1e-3)
    assert final["log_z_exact"] == pytest.approx(log_z, rel=1e-4)
    assert final["log_z_error"] == pytest.approx(log_z, rel=1e-4)  # the learned one starts at 0
