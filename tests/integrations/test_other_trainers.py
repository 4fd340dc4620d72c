"""The examples for slime, NeMo-RL, OpenRLHF and open-instruct, none of which installs on a CPU.

Stand-ins have the names, shapes and conventions of the sources that the examples cite; each test runs the batch in
micro-batches as that trainer does, and wants the loss and gradients of a mean over responses.
"""

import enum
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flowrl_kernels.losses import flowrl_loss
from flowrl_kernels.testing import assert_grad_close

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
LENGTHS, PROMPTS = [5, 1, 8, 3], [2, 4, 1, 3]
B, T = len(LENGTHS), max(LENGTHS)
REWARD = torch.tensor([0.7, -0.3, 1.1, -1.5])
HALVES = [range(2), range(2, 4)]


def padded():
    """Log-probs [B, T] near each other, and their mask."""
    make = torch.Generator().manual_seed(0)
    logp = -2.0 * torch.rand(B, T, generator=make)
    old, ref, sampler = (logp + 0.1 * torch.randn(B, T, generator=make) for _ in range(3))
    return logp, old, ref, sampler, torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def wanted(preset, weights=None):
    """(loss, gradient [B, T]) of the specification."""
    logp, old, ref, _, mask = (value.double() if value.is_floating_point() else value for value in padded())
    logp.requires_grad_()
    tis = {} if weights is None else {"logp_sampler": old - weights.double().log(), "tis": "token", "tis_cap": 1e30}
    out = flowrl_loss(
        logp, ref, REWARD.double(), None, logp_old=old, mask=mask, preset=preset, impl="reference", **tis
    )  # fmt: skip
    return out.loss, torch.autograd.grad(out.loss, logp)[0]


@pytest.fixture
def example(monkeypatch):
    """Imports an example beside modules that stand in for its trainer's."""

    def load(name, **modules):
        monkeypatch.syspath_prepend(str(EXAMPLES))
        for path, members in modules.items():
            parts = path.split("__")
            for i in range(1, len(parts) + 1):
                full = ".".join(parts[:i])
                if full not in sys.modules:
                    monkeypatch.setitem(sys.modules, full, ModuleType(full))
                    if i > 1:
                        monkeypatch.setattr(
                            sys.modules[".".join(parts[: i - 1])], parts[i - 1], sys.modules[full], raising=False
                        )
            vars(sys.modules[full]).update(members)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.mark.parametrize("preset", ["release_old_anchor_no_log_z", "release_no_log_z"])
def test_slime_s_sum_over_responses_is_the_mean_of_the_step(example, preset):
    logp, old, ref, _, _ = padded()
    x = logp.clone().requires_grad_()
    world = {"size": 1}
    slime = {
        "get_log_probs_and_entropy": lambda logits, *, args, unconcat_tokens, total_lengths, response_lengths: (
            torch.empty(0), {"log_probs": list(logits[0, :, 0].split(response_lengths))}
        ),
        "get_rollout_top_p_logprob_kwargs": lambda args, batch: {},
    }  # fmt: skip
    made = example(
        "slime_flowrl",
        megatron__core={"mpu": SimpleNamespace(get_context_parallel_world_size=lambda: world["size"])},
        slime__backends__megatron_utils__loss=slime,
    )
    made.SETTINGS["preset"] = preset

    def micro_batch(rows):
        def each(value):
            return [value[i, : LENGTHS[i]] for i in rows]

        batch = {
            "unconcat_tokens": each(torch.zeros(B, T)), "total_lengths": [LENGTHS[i] + PROMPTS[i] for i in rows],
            "response_lengths": [LENGTHS[i] for i in rows], "loss_masks": each(torch.ones(B, T, dtype=torch.int)),
            "log_probs": each(old), "ref_log_probs": each(ref) if preset == "release_no_log_z" else None,
            "advantages": each(REWARD[:, None].expand(B, T)),
        }  # fmt: skip
        logits = torch.cat([x[i, : LENGTHS[i]] for i in rows])[None, :, None]
        return made.flowrl(SimpleNamespace(use_rollout_logprobs=False), batch, logits, None)

    results = [micro_batch(rows) for rows in HALVES]
    total = sum(loss for loss, _ in results) / B  # loss_function: over step_global_batch_size
    total.backward()
    loss, gradient = wanted(preset)
    torch.testing.assert_close(total.double(), loss, rtol=1e-5, atol=1e-6)
    assert_grad_close(x.grad, gradient, rel=1e-5)
    assert sum(log["loss"] for _, log in results) / B == pytest.approx(loss.item(), rel=1e-5)
    assert all(value.dim() == 0 and not value.requires_grad for _, log in results for value in log.values())
    world["size"] = 2
    with pytest.raises(ValueError, match="context-parallel-size: wanted 1"):
        micro_batch(range(2))


class LossType(enum.Enum):
    SEQUENCE_LEVEL = "sequence_level"


class LossInputType(enum.Enum):
    LOGPROB = "logprob"


class MetricNormalizer(enum.Enum):
    TOKENS = "tokens"
    NONE = "none"


@pytest.mark.parametrize("preset", ["release_old_anchor_no_log_z", "release_no_log_z"])
@pytest.mark.parametrize("parts", [HALVES, [range(i, i + 1) for i in range(B)]], ids=["micro-batches", "packed"])
def test_nemo_rl_s_shares_add_up_to_the_global_batch(example, preset, parts):
    interfaces = {"LossType": LossType, "LossInputType": LossInputType, "MetricNormalizer": MetricNormalizer}
    made = example("nemo_rl_flowrl", nemo_rl__algorithms__loss__interfaces=interfaces)
    fn = made.FlowRLLossFn(object(), use_fused_linear_logprobs=False, preset=preset)
    logp, old, ref, sampler, mask = padded()
    x = logp.clone().requires_grad_()

    def micro_batch(rows):
        rows = list(rows)
        first = torch.zeros(len(rows), 1)  # NeMo-RL's rows are [B, S]; the log-prob of token 0 is unused

        def each(value):
            return torch.cat((first, value[rows]), 1)

        data = {
            "token_mask": each(mask.float()), "sample_mask": torch.ones(len(rows)), "prev_logprobs": each(old),
            "generation_logprobs": each(sampler), "advantages": each(REWARD[:, None].expand(B, T)),
        }  # fmt: skip
        if preset == "release_no_log_z":
            data["reference_policy_logprobs"] = each(ref)
        return fn(
            data=data, global_valid_seqs=torch.tensor(B), global_valid_toks=torch.tensor(sum(LENGTHS)),
            next_token_logprobs=x[rows],
        )  # fmt: skip

    results = [micro_batch(rows) for rows in parts]
    total = sum(loss for loss, _ in results)
    total.backward()
    loss, gradient = wanted(preset)
    torch.testing.assert_close(total.double(), loss, rtol=1e-5, atol=1e-6)
    assert_grad_close(x.grad, gradient, rel=1e-5)
    summed = {name: sum(metrics[name] for _, metrics in results) for name in results[0][1]}
    assert summed["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert summed["num_valid_samples"] == B
    error = ((sampler - old).abs().exp() * mask).sum() / mask.sum()
    assert summed["token_mult_prob_error"] == pytest.approx(error.item(), rel=1e-5)
    out = flowrl_loss(
        *(logp, ref, REWARD, None), logp_old=old, mask=mask, preset=preset, impl="reference"
    )  # means over the whole batch
    assert summed["flowrl_weight_mean"] == pytest.approx(out.metrics["weight_mean"].item(), rel=1e-5)


def test_nemo_rl_s_own_script_builds_our_loss(example, tmp_path, monkeypatch):
    script = tmp_path / "run_grpo.py"
    script.write_text(
        "import sys\nfrom nemo_rl.algorithms import grpo\ngrpo.seen = grpo.ClippedPGLossFn, sys.argv[:]\n"
    )
    interfaces = {"LossType": LossType, "LossInputType": LossInputType, "MetricNormalizer": MetricNormalizer}
    example("nemo_rl_flowrl", nemo_rl__algorithms__loss__interfaces=interfaces, nemo_rl__algorithms__grpo={})
    monkeypatch.setattr(sys, "argv", ["nemo_rl_flowrl.py", str(script), "--config", "x.yaml"])
    monkeypatch.delitem(sys.modules, "nemo_rl_flowrl")
    import runpy

    runpy.run_path(str(EXAMPLES / "nemo_rl_flowrl.py"), run_name="__main__")
    loss, argv = sys.modules["nemo_rl.algorithms.grpo"].seen
    assert loss.__name__ == "FlowRLLossFn"
    assert argv == [str(script), "--config", "x.yaml"]


@dataclass
class Experience:
    """OpenRLHF's, as far as a training step reads it."""

    action_log_probs: torch.Tensor
    base_action_log_probs: torch.Tensor
    advantages: torch.Tensor
    action_mask: torch.Tensor


class ActorPPOTrainer:
    """OpenRLHF's calls of the loss, in its `training_step`."""

    def __init__(self, logp):
        self.actor_loss_fn = None
        self.logp = logp

    def training_step(self, experience, kl_ctl, step, loss_batch_info=None):
        return self.actor_loss_fn(
            self.logp, experience.action_log_probs, experience.advantages, action_mask=experience.action_mask,
            rollout_log_probs=None, **loss_batch_info,
        )  # fmt: skip


@pytest.mark.parametrize("ranks", [1, 2])
def test_openrlhf_s_trainer_takes_the_loss_and_hands_it_the_reference(example, ranks):
    actor = {"ActorPPOTrainer": ActorPPOTrainer}
    made = example("openrlhf_flowrl", openrlhf__trainer__ray__ppo_actor=actor)
    made.install()
    logp, old, ref, _, mask = padded()
    x = logp.clone().requires_grad_()
    info = {"dp_size": ranks, "batch_num_tokens": mask.sum().float(), "global_batch_size": torch.tensor(float(B))}
    total = torch.zeros(())
    for rows in HALVES:
        rows = list(rows)
        trainer = sys.modules["openrlhf.trainer.ray.ppo_actor"].ActorPPOTrainer(x[rows])
        experience = Experience(old[rows], ref[rows], REWARD[rows, None].expand(2, T), mask[rows])
        loss, clipped, kl, vllm_kl = trainer.training_step(experience, 1e-8, 0, info)
        assert vllm_kl is None
        assert not clipped.detach().isnan()
        assert not kl.requires_grad
        total = total + loss / ranks  # DeepSpeed averages over the ranks
    total.backward()
    expected, gradient = wanted("release_no_log_z")
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    assert_grad_close(x.grad, gradient, rel=1e-5)


def test_open_instruct_s_packed_rows_are_told_apart(example):
    made = example("open_instruct_flowrl", open_instruct__grpo_utils={"INVALID_LOGPROB": 1.0})
    logp, old, ref, _, mask = padded()
    weights = torch.linspace(0.5, 1.5, B * T).view(B, T)
    x = logp.clone().requires_grad_()
    rows, padding = [[0, 1], [2, 3]], 3

    def packed(value, outside):
        """[2, S - 1]: two sequences to a row, each position holding what belongs to the token after it."""
        lines = []
        for row in rows:
            parts = []
            for i in row:
                parts += [torch.full((PROMPTS[i],), outside), value[i, : LENGTHS[i]]]
            lines.append(torch.cat(parts)[1:])
        width = max(len(line) for line in lines) + padding
        return torch.stack([torch.cat((line, torch.full((width - len(line),), outside))) for line in lines])

    width = max(sum(PROMPTS[i] + LENGTHS[i] for i in row) for row in rows) + padding
    ids = [torch.cat([torch.arange(PROMPTS[i] + LENGTHS[i]) for i in row]) for row in rows]
    position_ids = torch.stack([torch.cat((line, torch.zeros(width - len(line), dtype=torch.long))) for line in ids])
    utils = sys.modules["open_instruct.grpo_utils"]
    utils.forward_for_logprobs = lambda model, ids, attention_mask, position_ids, pad, temperature: (model, None)
    made.install()
    new, _ = utils.forward_for_logprobs(packed(x, 1.0), None, None, position_ids, 0, 1.0)
    response = packed(mask.float(), 0.0) > 0
    loss, clipped, kl = utils.compute_grpo_loss(
        new_logprobs=new, ratio=(new - packed(old, 1.0)).exp(), advantages=packed(REWARD[:, None].expand(B, T), 0.0),
        ref_logprobs=packed(ref, 1.0), config=None, rho_weights=packed(weights, 1.0),
    )  # fmt: skip
    assert loss.shape == clipped.shape == kl.shape == new.shape
    total = (loss * response).sum() / sum(LENGTHS) * (sum(LENGTHS) / B)  # masked_mean by tokens, and RESPONSE_TOKENS
    total.backward()
    expected, gradient = wanted("release_no_log_z", weights)
    torch.testing.assert_close(total.double(), expected, rtol=1e-4, atol=1e-5)
    assert_grad_close(x.grad, gradient, rel=1e-4)
