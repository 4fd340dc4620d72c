"""FlowRL in TRL: a real trainer learns, its numbers are the library's, and what cannot work says so."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

trl = pytest.importorskip("trl", reason="TRL is not installed here: `make test-integrations` has it")
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from flowrl_kernels import reference  # noqa: E402
from flowrl_kernels.integrations import trl as ours  # noqa: E402
from flowrl_kernels.losses import flowrl_loss  # noqa: E402
from flowrl_kernels.testing import assert_grad_close  # noqa: E402

PROMPTS = Dataset.from_list([{"prompt": f"{i}+{j}="} for i in range(8) for j in range(8)])


def late(completion_ids, **_) -> list[float]:
    """A stand-in for a verifier: late symbols of the vocabulary are good."""
    return [sum(ids) / len(ids) / 2 for ids in completion_ids]


def settings(folder, **changes):
    common = {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True,
        "per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 2,
        "max_completion_length": 6, "max_steps": 2, "logging_steps": 1, "save_strategy": "no",
        "learning_rate": 2e-3, "gradient_checkpointing": False, "lr_scheduler_type": "constant",
    }  # fmt: skip
    return common | changes


def flow_trainer(path, folder, peft_config=None, **changes):
    args = ours.FlowRLConfig(
        **settings(folder, **({"beta": 1.0, "log_z_learning_rate": 1e-2, "scale_rewards": "none"} | changes))
    )
    return ours.FlowRLTrainer(model=path, reward_funcs=late, args=args, train_dataset=PROMPTS, peft_config=peft_config)


def grpo(path, folder):
    args = trl.GRPOConfig(**settings(folder, beta=0.04, temperature=0.7, entropy_coef=0.01))
    return trl.GRPOTrainer(model=path, reward_funcs=late, args=args, train_dataset=PROMPTS)


def rollout(trainer) -> dict:
    trainer.model.train()
    return trainer._generate_and_score_completions([PROMPTS[i // 4] for i in range(16)])


def rows(inputs: dict, chosen) -> dict:
    return {k: v[chosen] if isinstance(v, Tensor) and v.dim() else v for k, v in inputs.items()}


# training ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    trainer = flow_trainer(
        tiny_model,
        folder,
        max_steps=30,
        per_device_train_batch_size=16,
        num_generations=8,
        save_strategy="steps",
        save_steps=15,
    )
    trainer.train()
    return trainer


def history(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_thirty_steps_lower_the_residual_and_raise_the_reward(run):
    residual, reward = history(run, "flowrl/residual_squared"), history(run, "reward")
    assert len(residual) == 30
    assert sum(residual[-5:]) < 0.8 * sum(residual[:5]), (residual[:5], residual[-5:])
    assert sum(reward[-5:]) > sum(reward[:5])


def test_log_z_learns_and_its_metrics_are_in_the_log(run):
    log_z = history(run, "flowrl/log_z_mean")
    assert log_z[0] == 0.0
    assert abs(log_z[-1]) > 0.01
    for name in ("flowrl/weight_mean", "flowrl/log_ratio_ref_mean", "flowrl/nonfinite", "entropy", "reward"):
        assert len(history(run, name)) == 30, name


def test_the_exported_model_holds_no_log_z(run):
    folder = Path(run.args.output_dir) / "checkpoint-30"
    names = load_file(folder / "model.safetensors").keys()
    assert not [name for name in names if "log_z" in name or "body" in name]
    assert set(load_file(folder / ours.LOG_Z_FILE)) == set(run.log_z.state_dict())


def test_log_z_and_its_moments_survive_save_and_resume(run, tiny_model, tmp_path):
    folder = Path(run.args.output_dir)
    again = flow_trainer(
        tiny_model, tmp_path, max_steps=30, per_device_train_batch_size=16, num_generations=8, save_strategy="no"
    )
    seen = []

    class Look(ours.TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            optimizer = getattr(again.optimizer, "optimizer", again.optimizer)
            moments = optimizer.state[again.log_z.out.weight]["exp_avg"].clone()
            seen.append(({k: v.clone() for k, v in again.log_z.state_dict().items()}, moments))

    again.add_callback(Look())
    again.train(resume_from_checkpoint=str(folder / "checkpoint-15"))
    weights, moments = seen[0]
    saved = load_file(folder / "checkpoint-15" / ours.LOG_Z_FILE)
    assert all(torch.equal(weights[name], saved[name]) for name in saved)
    assert moments.abs().max() > 0
    # with TRL's random state restored too, the run goes on as if it had not stopped
    assert torch.equal(again.log_z.out.weight, run.log_z.out.weight)
    (folder / "checkpoint-15" / ours.LOG_Z_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="log Z"):
        flow_trainer(tiny_model, tmp_path).train(resume_from_checkpoint=str(folder / "checkpoint-15"))


@pytest.mark.parametrize("log_z", ["group", "none"])
def test_it_trains_without_a_network_for_log_z(tiny_model, tmp_path, log_z):
    trainer = flow_trainer(tiny_model, tmp_path, log_z=log_z, max_steps=8, num_iterations=2)
    trainer.train()
    assert trainer.log_z is None
    assert all(value == value for value in history(trainer, "loss"))
    moved = history(trainer, "flowrl/log_z_mean")
    assert (max(map(abs, moved)) > 0) == (log_z == "group")


def test_two_processes_keep_one_log_z(tiny_model, tmp_path):
    script = Path(__file__).parent / "trl_two_ranks.py"
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run([*command, tiny_model, str(tmp_path)], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == 2
    assert first["log_z"] == second["log_z"]
    assert any(first["log_z"])
    assert first["model"] == second["model"]


# numbers -------------------------------------------------------------------------------------------------------------


def eager(trainer, model, inputs, dtype=torch.float64):
    """Log-probs [B, T] by the reference from the model's own hidden states."""
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    hidden = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    keep = inputs["completion_ids"].size(1)
    rows_ = hidden[:, -keep - 1 : -1].reshape(-1, hidden.size(-1)).to(dtype)
    target = inputs["completion_ids"].masked_fill(inputs["completion_mask"] == 0, -100).reshape(-1)
    out = reference.linear_logprob(rows_, model.lm_head.weight.to(dtype), target, None, trainer.temperature)
    return out.logp.view(-1, keep), hidden


def test_the_loss_and_its_gradients_are_those_of_the_specification(tiny_model, tmp_path):
    trainer = flow_trainer(tiny_model, tmp_path, temperature=0.7, beta=15.0, num_iterations=2)
    inputs = rollout(trainer)
    torch.nn.init.normal_(trainer.log_z.out.weight)
    with torch.no_grad():  # a policy that has moved since it sampled
        trainer.model.lm_head.weight.mul_(1.05)
    inputs["old_per_token_logps"] = inputs["old_per_token_logps"] + 0.01
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer._compute_loss(trainer.model, inputs)
    parameters = [trainer.model.lm_head.weight, trainer.model.model.embed_tokens.weight, trainer.log_z.body[0].weight]
    grads = torch.autograd.grad(loss, parameters)

    logp, hidden = eager(trainer, trainer.model, inputs)
    log_z = trainer.log_z(hidden[:, : inputs["prompt_ids"].size(1)], inputs["prompt_mask"])
    expected = flowrl_loss(
        logp, inputs["ref_per_token_logps"].double(), inputs["advantages"].double(), log_z.double(),
        logp_old=inputs["old_per_token_logps"].double(), mask=inputs["completion_mask"].bool(), impl="reference",
    )  # fmt: skip
    assert expected.weight.std() > 0
    torch.testing.assert_close(loss.double(), expected.loss, rtol=1e-5, atol=1e-6)
    for actual, wanted in zip(grads, torch.autograd.grad(expected.loss, parameters)):
        assert_grad_close(actual, wanted, rel=2e-4)


@pytest.mark.parametrize("log_z", ["learned", "group"])
def test_accumulated_micro_batches_give_the_gradient_of_one_batch(tiny_model, tmp_path, log_z):
    trainer = flow_trainer(tiny_model, tmp_path, log_z=log_z)
    inputs = rollout(trainer)
    parameters = [trainer.model.lm_head.weight, trainer.model.model.embed_tokens.weight]
    if log_z == "learned":
        torch.nn.init.normal_(trainer.log_z.out.weight)
        parameters.append(trainer.log_z.body[0].weight)

    def gradient(parts: int):
        trainer.current_gradient_accumulation_steps = parts
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))  # TRL splits groups up
        total = [torch.zeros_like(p) for p in parameters]
        for chosen in order.chunk(parts):
            loss = trainer._compute_loss(trainer.model, rows(inputs, chosen))
            for sum_, part in zip(total, torch.autograd.grad(loss, parameters)):
                sum_ += part
        return total

    for several, one in zip(gradient(4), gradient(1)):
        assert_grad_close(several, one, rel=1e-5, row=1e-3)


def test_the_groups_log_z_is_the_library_s_own(tiny_model, tmp_path):
    trainer = flow_trainer(tiny_model, tmp_path, log_z="group")
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    inputs = rollout(trainer)
    args = (inputs["old_per_token_logps"], inputs["ref_per_token_logps"], inputs["advantages"])
    mask, groups = inputs["completion_mask"].bool(), torch.arange(16) // 4
    handed = flowrl_loss(*args, inputs["log_z"], mask=mask, beta=1.0)
    whole = flowrl_loss(*args, "group", groups=groups, mask=mask, beta=1.0)
    torch.testing.assert_close(handed.residual, whole.residual, rtol=1e-5, atol=1e-6)
    assert inputs["log_z"].abs().max() > 1e-3


@pytest.mark.parametrize("mode", ["sequence_mask", "sequence_truncate", "token_truncate", "token_mask"])
def test_vllm_s_importance_weights_are_the_second_weight(tiny_model, tmp_path, mode):
    trainer = flow_trainer(tiny_model, tmp_path, vllm_importance_sampling_mode=mode)
    trainer.use_vllm = True
    trainer.flowrl_loss = trainer._make_loss()
    inputs = rollout_without_vllm(trainer)
    by_token = mode.startswith("token")
    ratio = torch.linspace(0.0, 3.0, 16)[:, None].expand(16, inputs["completion_ids"].size(1) if by_token else 1)
    inputs["importance_sampling_ratio"] = ratio
    seen = []
    trainer.flowrl_loss.register_forward_hook(lambda module, args, out: seen.append(out.weight))
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs)
    torch.testing.assert_close(seen[0], ratio[:, 0], rtol=1e-4, atol=1e-6)


def rollout_without_vllm(trainer) -> dict:
    trainer.use_vllm = False
    inputs = rollout(trainer)
    with torch.no_grad():
        inputs["old_per_token_logps"] = trainer._policy(trainer.model, inputs)[0]
    trainer.use_vllm = True
    return inputs


# rewards that are not there -----------------------------------------------------------------------------------------


def rewarded(path, folder, rewards, **changes):
    """A trainer whose reward function answers `rewards` for its 16 completions."""
    args = ours.FlowRLConfig(**settings(folder, beta=1.0, scale_rewards="none", **changes))
    give = lambda completions, **_: [rewards(i) for i in range(len(completions))]  # noqa: E731
    return ours.FlowRLTrainer(model=path, reward_funcs=give, args=args, train_dataset=PROMPTS)


def gradients(trainer, inputs):
    trainer.current_gradient_accumulation_steps = 1
    parameters = [trainer.model.lm_head.weight, *(trainer.log_z.parameters() if trainer.log_z else [])]
    loss = trainer._compute_loss(trainer.model, inputs)
    grads = torch.autograd.grad(loss, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, grads)]


@pytest.mark.parametrize("log_z", ["learned", "group", "none"])
@pytest.mark.parametrize("missing", [None, float("nan")])
def test_completions_without_a_reward_give_no_gradient(tiny_model, tmp_path, log_z, missing):
    trainer = rewarded(tiny_model, tmp_path, lambda i: missing, log_z=log_z)
    inputs = rollout(trainer)
    with torch.no_grad():  # a policy away from its reference: with a reward of 0 there would be a residual
        trainer.model.lm_head.weight.mul_(1.1)
    assert all(g.eq(0).all() for g in gradients(trainer, inputs))


def test_a_run_without_any_reward_leaves_the_weights_alone(tiny_model, tmp_path):
    trainer = rewarded(tiny_model, tmp_path, lambda i: None)
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    before = {name: p.clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert max(history(trainer, "grad_norm")) == 0.0
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_a_group_with_some_rewards_learns_from_those_alone(tiny_model, tmp_path):
    trainer = rewarded(tiny_model, tmp_path, lambda i: None if i % 4 == 1 or i < 4 else float(i % 4), log_z="group")
    inputs = rollout(trainer)
    scored = torch.tensor([not (i % 4 == 1 or i < 4) for i in range(16)])
    assert torch.equal(~inputs["unscorable"], scored)
    want = torch.tensor([0.0, 0, 2, 3]).sub(5 / 3).masked_fill(~scored[4:8], 0.0).repeat(3)
    torch.testing.assert_close(inputs["advantages"][4:], want)  # TRL centres on the scored ones
    with torch.no_grad():
        trainer.model.lm_head.weight.mul_(1.1)
    mine = gradients(trainer, inputs)
    alone = rows(inputs, scored)
    parts = [g * scored.sum() / 16 for g in gradients(trainer, alone)]  # the loss is over B
    for got, wanted in zip(mine, parts):
        assert_grad_close(got, wanted, rel=1e-5, row=1e-3)


def test_an_infinite_reward_is_refused(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="reward_funcs: wanted finite numbers, or None"):
        rollout(rewarded(tiny_model, tmp_path, lambda i: float("inf") if i == 2 else 1.0))


# heads that scale ---------------------------------------------------------------------------------------------------


def test_a_soft_cap_that_trl_does_not_know_is_in_the_log_probs_and_an_unknown_head_is_refused(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "hf")
    from tiny_models import tiny
    from trl.trainer.utils import add_fused_lm_head

    model = tiny("recurrent_gemma")
    model.get_output_embeddings().weight.data *= 60
    add_fused_lm_head(model, 0.7)
    ours._fuse(model, "auto", check=True)
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        got = model(input_ids=ids, labels=ids, fused_lm_head=True).log_probs[0]
    want = (z / 0.7).log_softmax(-1).gather(-1, ids[0, 1:, None])[:, 0]
    assert z.abs().max() > 15
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    odd = tiny("qwen2")
    theirs = odd.lm_head.forward
    odd.lm_head.forward = lambda hidden: theirs(hidden) / 4.0
    add_fused_lm_head(odd, 0.7)
    with pytest.raises(ValueError, match="does not know"):
        ours._fuse(odd, "auto", check=True)


# adapters ------------------------------------------------------------------------------------------------------------


def test_lora_off_the_head_trains_and_its_reference_is_the_base_model(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trainer = flow_trainer(tiny_model, tmp_path, peft_config=lora, max_steps=3)
    assert trainer.ref_model is None
    inputs = rollout(trainer)
    base = trainer.model.get_base_model()
    logp, _, _ = trainer._policy(trainer.model, inputs)
    torch.testing.assert_close(logp.double(), eager(trainer, base, inputs)[0], rtol=0, atol=1e-5)
    with trainer.model.disable_adapter():
        wanted = eager(trainer, base, inputs)[0]
    torch.testing.assert_close(inputs["ref_per_token_logps"].double(), wanted, rtol=0, atol=1e-5)
    assert (logp - wanted).abs().max() > 1e-3
    before = base.lm_head.weight.clone()
    trainer.train()
    assert torch.equal(before, base.lm_head.weight)
    assert abs(history(trainer, "flowrl/log_z_mean")[-1]) > 0


def test_a_head_trained_whole_beside_lora_keeps_its_reference(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = flow_trainer(tiny_model, tmp_path, peft_config=lora)
    base = trainer.model.get_base_model()
    with torch.no_grad():
        base.lm_head.modules_to_save["default"].weight.mul_(1.5)
    inputs = rollout(trainer)
    logp, _, _ = trainer._policy(trainer.model, inputs)
    assert (logp - inputs["ref_per_token_logps"]).abs().max() > 1e-2
    logp.sum().backward()
    assert base.lm_head.modules_to_save["default"].weight.grad.abs().max() > 0


def test_an_adapter_on_the_head_is_refused_with_what_to_do(tiny_model, tmp_path):
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="target_modules"):
        flow_trainer(tiny_model, tmp_path, peft_config=lora)  # TRL's own refusal
    trainer = grpo(tiny_model, tmp_path)
    trainer.model = peft.get_peft_model(trainer.model, lora)
    with pytest.raises(ValueError, match="modules_to_save"):
        ours.patch_logprobs(trainer)


# what cannot work ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"log_z": "mlp"}, "log_z: wanted 'learned', 'group' or 'none'"),
        ({"loss_type": "dapo"}, "loss_type: wanted 'flowrl'"),
        ({"beta": 0.0}, "beta: wanted a number above 0"),
        ({"epsilon": 0.1}, "epsilon: wanted 0.2"),
        ({"entropy_coef": 0.01}, "entropy_coef: wanted 0.0"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
    ],
)
def test_an_option_that_would_be_ignored_raises(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        ours.FlowRLConfig(**settings(tmp_path, **changes))


def test_a_grpo_config_is_refused(tiny_model, tmp_path):
    args = trl.GRPOConfig(**settings(tmp_path))
    with pytest.raises(TypeError, match="FlowRLConfig"):
        ours.FlowRLTrainer(model=tiny_model, reward_funcs=late, args=args, train_dataset=PROMPTS)


def test_another_trl_is_refused_by_name(monkeypatch):
    class Other:
        @staticmethod
        def forward(ctx, hidden, weight, targets): ...

    monkeypatch.setattr(ours.trl_utils, ours.HEAD, Other)
    with pytest.raises(ImportError, match=r"TRL .* has one that takes .*trl==1\.16\.0"):
        ours._check_version()
    monkeypatch.delattr(ours.trl_utils, ours.HEAD)
    with pytest.raises(ImportError, match="has none"):
        ours._check_version()


def test_zero_3_a_second_patch_and_a_trainer_without_a_fused_head_are_refused(tiny_model, tmp_path, monkeypatch):
    trainer = grpo(tiny_model, tmp_path)
    monkeypatch.setattr(ours, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(RuntimeError, match="ZeRO-2 or FSDP2"):
        ours.patch_logprobs(trainer)
    monkeypatch.undo()
    ours.patch_logprobs(trainer)
    with pytest.raises(ValueError, match="already patched"):
        ours.patch_logprobs(trainer)
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    plain = Trainer(
        AutoModelForCausalLM.from_pretrained(tiny_model), TrainingArguments(str(tmp_path), use_cpu=True, report_to=[])
    )
    with pytest.raises(ValueError, match="fused head"):
        ours.patch_logprobs(plain)
    with pytest.raises(ValueError, match="a TRL trainer"):
        ours.patch_logprobs(object())
