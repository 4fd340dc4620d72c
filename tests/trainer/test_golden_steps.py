"""One step of every algorithm against `golden.py`: loss, gradient, learning rate and new parameters of each update."""

import copy
import dataclasses
import math

import golden
import pytest
import tiny
import torch

from flowrl_kernels.testing import assert_grad_close
from flowrl_kernels.trainer import config_file, loop, objective, parallel
from flowrl_kernels.trainer import run as runs
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.log import read_lines
from flowrl_kernels.trainer.rollout import Generated, Kept
from flowrl_kernels.trainer.rollout.hf import HFEngine

GROUPS, SAMPLES, BUDGET, TEMPERATURE = 4, 4, 6, 0.8
LENGTHS = [6, 2, 4, 1, 3, 6, 5, 2, 1, 4, 6, 3, 2, 3, 1, 4]
FINISHED = [False if i == 0 else n < BUDGET or i == 5 for i, n in enumerate(LENGTHS)]
MIXED = [1.0, 0.0, 0.5, 0.25, 0.0, 1.0, 0.0, 0.0, 0.3, 0.9, 0.6, 0.0, 0.5, 0.5, 0.5, 0.5]  # the last group is equal
MISSING = [None if i == 6 else r for i, r in enumerate(MIXED)]

SETTINGS = tiny.flags(f"""
    rollout.prompts {GROUPS}  rollout.samples {SAMPLES}  rollout.max_new_tokens {BUDGET}
    rollout.temperature {TEMPERATURE}  run.steps 1  model.hidden 16  model.heads 2  model.ffn 24
    algorithm.epochs 2  algorithm.minibatch_prompts 2  parallel.max_tokens 24
    optim.lr 0.01  optim.warmup 1  optim.weight_decay 0.1  optim.max_grad_norm 0.7
""")
SHAPES = {  # the advantage by name, a second time: from the papers, not from the table
    **dict.fromkeys(("grpo", "dapo", "gspo", "cispo"), "zscore"),
    "dr_grpo": "centred",
    "rloo": "left out",
    "opo": "by length",
    "ppo": "raw",
    "reinforce_pp": "raw",
    "reinforce_pp_baseline": "centred",
    "raft": "raw",
    "reinforce_rej": "raw",
}
FILTERED = ("dapo", "reinforce_rej")
BETA, LOG_Z = {"paper": 15.0, "tb": 1.0}, "learned"

CASES = {
    "flowrl paper": ("", MISSING),
    "flowrl paper, group's log Z, own clip": ("algorithm.log_z group  optim.schedule wsd", MISSING),
    "flowrl paper, no log Z, sampler's weight": (
        "algorithm.log_z none  algorithm.tis_cap 1.05  algorithm.reward centred  algorithm.beta 3.0", MIXED),
    "flowrl paper, one update, log Z at its own rate": (
        "algorithm.epochs 1  algorithm.minibatch_prompts 0  log_z.lr 0.03  algorithm.overlong_buffer 3 "
        "algorithm.unlikeliness 0.5", MIXED),
    "flowrl tb": ("algorithm.preset tb  algorithm.reward raw  optim.schedule linear", MISSING),
    "flowrl tb, no log Z, filtered": (
        "algorithm.preset tb  algorithm.log_z none  algorithm.filter_groups True  algorithm.beta 2.0", MIXED),
    "flowrl tb, modes covered": (
        "algorithm.preset tb  algorithm.reward raw  algorithm.alpha 0.0  optim.schedule linear", MISSING),
    "grpo": ("algorithm.name grpo  algorithm.kl 0.2  algorithm.entropy 0.05", MISSING),
    "grpo, one update": (
        "algorithm.name grpo  algorithm.epochs 1  algorithm.minibatch_prompts 0  algorithm.kl 0.5", MIXED),
    "grpo, unlikeliness, dual clip": (
        "algorithm.name grpo  algorithm.unlikeliness 0.5  algorithm.dual_clip 1.5  optim.schedule cosine", MIXED),
    "grpo, far from its reference": ("algorithm.name grpo  algorithm.kl 0.1  optim.lr 0.03", MIXED),
    "dapo": ("algorithm.name dapo  algorithm.overlong_buffer 3  algorithm.overlong_penalty 0.7", MIXED),
    "dr_grpo": ("algorithm.name dr_grpo  algorithm.entropy 0.1", MISSING),
    "gspo": ("algorithm.name gspo  algorithm.kl 0.1  algorithm.filter_groups True  optim.lr 0.004", MIXED),
    "cispo": ("algorithm.name cispo  algorithm.overlong_buffer 2", MIXED),
    "ppo": ("algorithm.name ppo  algorithm.gamma 0.9  algorithm.gae_lambda 0.8  algorithm.value_clip 0.01 "
            "critic.lr 0.02  algorithm.kl 0.1  optim.lr 0.002", MISSING),
    "reinforce_pp": ("algorithm.name reinforce_pp  algorithm.kl 0.3  algorithm.gamma 0.95", MISSING),
    "reinforce_pp_baseline": (
        "algorithm.name reinforce_pp_baseline  algorithm.kl 0.3  algorithm.gamma 0.95", MISSING),
    "rloo": ("algorithm.name rloo  algorithm.kl 0.1  algorithm.entropy 0.02", MISSING),
    "opo": ("algorithm.name opo", MISSING),
    "raft": ("algorithm.name raft  algorithm.entropy 0.02", MISSING),
    "reinforce_rej": ("algorithm.name reinforce_rej  algorithm.kl 0.1", MIXED),
    "dapo, tokens rejected and weighed": (
        "algorithm.name dapo  algorithm.correction token_truncate+token_k1  algorithm.entropy 0.1 "
        f"algorithm.correction_cap 1.02,0.85_{1 / 0.85}", MIXED),
    "ppo, tokens rejected and weighed": (
        "algorithm.name ppo  algorithm.correction token_truncate+token_k1  optim.lr 0.002 critic.lr 0.02 "
        f"algorithm.correction_cap 1.02,0.85_{1 / 0.85}", MIXED),
    "gspo, responses masked": (
        "algorithm.name gspo  algorithm.correction sequence_mask  algorithm.correction_cap 0.9_1.3  algorithm.kl 0.1 "
        "optim.lr 0.004", MIXED),
    "flowrl tb, responses masked": (
        "algorithm.preset tb  algorithm.correction sequence_mask  algorithm.correction_cap 0.9_1.3", MIXED),
    "flowrl paper, over kept tokens": ("rollout.top_p 0.9  algorithm.tis_cap 1.05", MISSING),
    "grpo, over kept tokens": ("algorithm.name grpo  rollout.top_k 5  algorithm.kl 0.2  algorithm.entropy 0.05", MIXED),
}  # fmt: skip
OWN_CLIP = {"flowrl paper, group's log Z, own clip": (0.9, 1.5)}


def rows():
    """Token ids of the fixed responses, the end token last where there is one."""
    make = torch.Generator().manual_seed(11)
    return [
        [*torch.randint(2, 14, (n - done,), generator=make).tolist(), *([1] if done else [])]
        for n, done in zip(LENGTHS, FINISHED)
    ]


def kept_of(tokens, make):
    """For each token some ids that it could have been drawn from, itself among them."""
    return [
        sorted({token, *torch.randperm(14, generator=make)[: 1 + t % 5].tolist()}) for t, token in enumerate(tokens)
    ]


class Rewards(runs.Scorer):
    given = MIXED

    def score(self, problems, responses):
        return list(self.given) if len(responses) == len(self.given) else [0.0] * len(responses)


class Recorder:
    """Puts fixed responses under a policy that has moved, and notes what the trainer makes of them."""

    def __init__(self, monkeypatch, rewards):
        self.start = self.responses = None
        self.gradients, self.updates = [], []
        monkeypatch.setattr(Rewards, "given", rewards)
        monkeypatch.setattr(runs, "Scorer", Rewards)
        generate, clip, apply = HFEngine.generate, parallel.clip, loop.apply

        def fixed(engine, prompts, n, *args, **kwargs):
            if self.start is not None:  # an evaluation
                return generate(engine, prompts, n, *args, **kwargs)
            self.reference = copy.deepcopy(engine.policy).double()
            make = torch.Generator().manual_seed(5)
            with torch.no_grad():  # away from the reference, from a log Z of 0 and from values of 0
                for p in engine.policy.parameters():
                    p.add_(0.1 * torch.randn(p.shape, generator=make))
            self.start = copy.deepcopy(engine.policy).double()
            self.responses = []
            for i, tokens in enumerate(rows()):
                r = golden.Response(i // n, list(prompts[i // n]), tokens, torch.empty(0), Rewards.given[i])
                r.kept = kept_of(tokens, make) if args[0].truncated else None
                with torch.no_grad():
                    logp = golden.read(self.start, r, TEMPERATURE)[0]
                r.sampler = (logp + 0.1 * torch.randn(len(tokens), generator=make)).float().double()
                self.responses.append(r)
            tokens, logp = torch.zeros(len(LENGTHS), BUDGET).long(), torch.zeros(len(LENGTHS), BUDGET)
            for i, r in enumerate(self.responses):
                tokens[i, : LENGTHS[i]], logp[i, : LENGTHS[i]] = torch.tensor(r.tokens), r.sampler.float()
            kept = None
            if args[0].truncated:
                sets = [torch.tensor(ids) for r in self.responses for ids in r.kept]
                kept = Kept(torch.cat(sets), torch.tensor([0, *map(len, sets)]).cumsum(0))
            return Generated(tokens, logp, torch.tensor(LENGTHS), torch.tensor(FINISHED), kept)

        def noting(parameters, most):
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
            self.gradients.append(torch.cat([g.flatten() for g in grads]).double())
            return clip(parameters, most)

        def applying(run, progress, update):
            result = apply(run, progress, update)
            self.updates.append((result, torch.cat([p.detach().flatten() for p in run.parameters]).double()))
            return result

        monkeypatch.setattr(HFEngine, "generate", fixed)
        monkeypatch.setattr(parallel, "clip", noting)
        monkeypatch.setattr(loop, "apply", applying)


def expected(config, recorder):
    a, o = dataclasses.asdict(config.algorithm), dataclasses.asdict(config.optim)
    a["shape"] = SHAPES[a["name"]] if a["name"] != "flowrl" else a["reward"]
    a["filter"] = a["filter_groups"] or a["name"] in FILTERED
    a["old"] = a["epochs"] > 1 or a["minibatch_prompts"] > 0 or a["name"] == "ppo"
    a["beta"] = a["beta"] or BETA[a["preset"]]
    a["log_z"] = LOG_Z if a["log_z"] == "preset" else a["log_z"]
    if a["name"] != "flowrl":
        a["log_z"] = "none"
    policy = recorder.start
    rates = [(list(policy.model.parameters()), config.optim.lr)]
    if policy.log_z is not None:
        rates.append((list(policy.log_z.parameters()), config.log_z.lr or config.optim.lr))
    if policy.value is not None:
        rates.append((list(policy.value.parameters()), config.critic.lr))
    before = torch.cat([p.detach().flatten() for parameters, _ in rates for p in parameters])
    return before, golden.step(
        policy, recorder.reference, recorder.responses, a, o, temperature=TEMPERATURE, budget=BUDGET, rates=rates,
        groups_per_update=a["minibatch_prompts"] or GROUPS, epochs=a["epochs"],
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_what_the_papers_say(monkeypatch, tmp_path, case):
    text, rewards = CASES[case]
    args = [*tiny.SMALL, *SETTINGS, *tiny.flags(text), "--run.dir", str(tmp_path / "run")]
    config = config_file.override(Config(), [*args, "--run.cache", str(tmp_path / "cache")])
    optim = dataclasses.replace(config.optim, betas=(0.8, 0.98))
    config = dataclasses.replace(config, optim=optim)
    if case in OWN_CLIP:
        config = dataclasses.replace(config, algorithm=dataclasses.replace(config.algorithm, clip=OWN_CLIP[case]))
    recorder = Recorder(monkeypatch, rewards)
    loop.train(config)
    before, wanted = expected(config, recorder)
    assert len(recorder.updates) == len(recorder.gradients) == len(wanted)
    assert max(abs(g.loss) for g in wanted) > 0.01  # else the numbers below could be right by being nothing
    for number, (want, (got, parameters), gradient) in enumerate(zip(wanted, recorder.updates, recorder.gradients)):
        rel = 1e-4 if number == 0 else 2e-3  # later: Adam divides by roots of squares, so roundings have grown
        assert got.loss == pytest.approx(want.loss, rel=rel, abs=2e-6), f"update {number + 1}"
        assert got.lr == pytest.approx(want.lr, rel=1e-9)
        assert got.grad_norm == pytest.approx(want.norm, rel=rel)
        assert not got.skipped
        assert_grad_close(gradient[:, None], want.gradient[:, None], rel=rel, row=math.inf)
        assert_grad_close((parameters - before)[:, None], (want.parameters - before)[:, None], rel=5e-3, row=math.inf)
    check_log(tmp_path, recorder, [result for result, _ in recorder.updates], objective.needs(config).old)


def check_log(tmp_path, recorder, results, scored):
    """The step's line in the log, from the responses themselves."""
    (row,) = [r for r in read_lines(tmp_path / "run" / "metrics.jsonl") if r["kind"] == "train"]
    known, tokens = [r.reward for r in recorder.responses if r.reward is not None], sum(LENGTHS)
    assert row["reward"] == pytest.approx(sum(known) / len(known))
    assert row["length"] == pytest.approx(tokens / len(LENGTHS))
    assert row["truncated"] == pytest.approx(FINISHED.count(False) / len(LENGTHS))
    assert row["entropy"] == pytest.approx(-sum(float(r.sampler.sum()) for r in recorder.responses) / tokens, rel=1e-5)
    assert row["loss"] == pytest.approx(sum(r.loss for r in results) / len(results))
    weights = [out.weight for r in results for out, _ in r.outputs]
    if "weight_min" in row:
        assert row["weight_min"] == pytest.approx(float(torch.cat(weights).min()))
        assert row["weight_max"] == pytest.approx(float(torch.cat(weights).max()))
    live = [r for r in recorder.responses if r.took_part]
    gaps = torch.cat([r.old - r.sampler for r in live])
    weight = torch.cat([r.weight * r.stays for r in live])
    if row.get("mismatch_cut", 0.0) == 0.0:
        weight = gaps.exp()
    if scored:  # else of a few responses, or of the only pass
        assert row["mismatch_kl"] == pytest.approx(-float(gaps.mean()), rel=1e-3)
        assert row["mismatch_k3"] == pytest.approx(float((gaps.exp() - 1 - gaps).mean()), rel=1e-3)
        assert row["mismatch_max"] == pytest.approx(float(gaps.abs().max()), rel=1e-4)
        assert row["mismatch_ess"] == pytest.approx(float(weight.mean() ** 2 / weight.square().mean()), rel=1e-4)
    else:
        assert 0.0 < row["mismatch_k3"] < 0.1
        assert 0.5 < row["mismatch_ess"] < 1.0
