"""FlowRL through verl's own loss path: registry, `compute_advantage` on a DataProto, `ppo_loss` on jagged tensors."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("verl", reason="verl is not installed here: `make test-integrations` has it")
from tensordict import TensorDict
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos, ray_trainer
from verl.utils import tensordict_utils as tu
from verl.workers import engine_workers
from verl.workers.config import ActorConfig, PolicyLossConfig

from flowrl_kernels.advantages import group_normalize
from flowrl_kernels.integrations import verl as ours
from flowrl_kernels.losses import flowrl_loss
from flowrl_kernels.testing import assert_grad_close

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
B, T, PROMPT = 8, 7, 3
LENGTHS = [7, 1, 4, 2, 6, 3, 5, 7]
GROUPS = torch.arange(B) // 4


def actor(mode: str, **changes) -> ActorConfig:
    settings = {
        "strategy": "fsdp", "rollout_n": 4, "ppo_micro_batch_size_per_gpu": 4, "use_kl_loss": True, "kl_loss_coef": 0.0,
        "loss_agg_mode": "seq-mean-token-mean", "policy_loss": PolicyLossConfig(loss_mode=mode),
    }  # fmt: skip
    return ActorConfig(**(settings | changes))


def mask_of() -> Tensor:
    return torch.arange(T) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Padded [B, T] log-probs near each other, and outcome rewards."""
    make = torch.Generator().manual_seed(0)
    old = -3.0 * torch.rand(B, T, generator=make)
    near = {name: old + 0.1 * torch.randn(B, T, generator=make) for name in ("ref_log_prob", "log_prob")}
    scores = torch.zeros(B, T)
    scores[torch.arange(B), torch.tensor(LENGTHS) - 1] = torch.rand(B, generator=make)
    return {"old_log_probs": old, "token_level_rewards": scores, **near}


def advantages(batch: dict[str, Tensor], estimator: str, keys=("old_log_probs", "ref_log_prob"), **algorithm) -> Tensor:
    """What verl's trainer computes before the update."""
    tensors = {"token_level_rewards": batch["token_level_rewards"], "response_mask": mask_of().long()}
    data = DataProto.from_dict(
        tensors=tensors | {key: batch[key] for key in keys},
        non_tensors={"uid": np.array([f"prompt-{int(g)}" for g in GROUPS], dtype=object)},
    )
    config = AlgoConfig(adv_estimator=estimator, **algorithm)
    return ray_trainer.compute_advantage(data, adv_estimator=estimator, config=config).batch["advantages"]


def jagged(padded: Tensor, rows) -> Tensor:
    return torch.nested.as_nested_tensor([padded[i, : LENGTHS[i]] for i in rows], layout=torch.jagged)


def actor_data(batch, advantage, rows=range(B), dp_size=1, size: int | None = B, **more: Tensor) -> TensorDict:
    """A micro-batch as verl's engine hands it to the loss."""
    fields = {
        "prompts": torch.nested.as_nested_tensor(
            [torch.ones(PROMPT, dtype=torch.long) for _ in rows], layout=torch.jagged
        ),
        "responses": jagged(torch.ones(B, T, dtype=torch.long), rows),
        "response_mask": jagged(mask_of().long(), rows),
        "advantages": jagged(advantage, rows),
        "old_log_probs": jagged(batch["old_log_probs"], rows),
        "ref_log_prob": jagged(batch["ref_log_prob"], rows),
    } | {name: jagged(value, rows) for name, value in more.items()}
    data = TensorDict(fields, batch_size=[len(rows)])
    tokens = sum(LENGTHS) if size is not None else None
    for key, value in {"dp_size": dp_size, "batch_num_tokens": tokens, "global_batch_size": size}.items():
        tu.assign_non_tensor_data(data, key, value)
    return data


def model_output(log_prob: Tensor, rows=range(B)) -> dict[str, Tensor]:
    """Log-probs over prompt and response, each at the token before, as the engine has them."""
    values = []
    for i in rows:
        values += [log_prob.new_zeros(PROMPT - 1), log_prob[i, : LENGTHS[i]], log_prob.new_zeros(1)]
    offsets = torch.tensor([0] + [PROMPT + LENGTHS[i] for i in rows]).cumsum(0)
    return {"log_probs": torch.nested.nested_tensor_from_jagged(torch.cat(values), offsets=offsets)}


def specification(batch, log_prob, log_z="group", **settings):
    reward = group_normalize(batch["token_level_rewards"].sum(1).double(), GROUPS)
    old, ref = batch["old_log_probs"].double(), batch["ref_log_prob"].double()
    if log_z == "group":  # estimated where the batch was sampled
        d = flowrl_loss(old, ref, reward, None, mask=mask_of(), impl="reference").residual
        log_z = torch.cat([-d[g == GROUPS].mean().expand(4) for g in (0, 1)])
    return flowrl_loss(
        log_prob.double(), ref, reward, log_z, logp_old=old, mask=mask_of(), impl="reference", **settings
    )  # fmt: skip


@pytest.mark.parametrize("variable", ["VERL_NO_SUCH", "VERL_USE_EXTERNAL_MODULES"])
def test_a_bare_import_of_verl_registers_flowrl(variable):
    code = (
        "import verl; from verl.trainer.ppo import core_algos as c; from verl.workers import engine_workers as w;"
        "assert 'flowrl' in c.POLICY_LOSS_REGISTRY and 'flowrl' in c.ADV_ESTIMATOR_REGISTRY;"
        "assert hasattr(w.ppo_loss, 'flowrl_slot')"
    )
    env = __import__("os").environ | {variable: "flowrl_kernels.integrations.verl"}
    if variable == "VERL_USE_EXTERNAL_MODULES":
        env["VERL_USE_EXTERNAL_PLUGINS"] = "none"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("name", ["flowrl", "flowrl_release", "flowrl_unclipped", "flowrl_no_is"])
def test_values_and_gradients_through_verl_are_the_specification_s(batch, name):
    log_prob = batch["log_prob"].clone().requires_grad_()
    data = actor_data(batch, advantages(batch, name))
    loss, metrics = engine_workers.ppo_loss(actor(name), model_output(log_prob), data)
    wanted_at = batch["log_prob"].double().requires_grad_()
    wanted = specification(batch, wanted_at, preset=ours.PRESET_NAMES[name])
    torch.testing.assert_close(loss.double(), wanted.loss, rtol=1e-5, atol=1e-6)
    actual, expected = torch.autograd.grad(loss, log_prob)[0], torch.autograd.grad(wanted.loss, wanted_at)[0]
    assert_grad_close(actual, expected, rel=1e-5, row=1e-3)
    assert metrics["actor/flowrl_weight_mean"].aggregate() == pytest.approx(wanted.weight.mean().item(), rel=1e-4)
    assert metrics["actor/pg_loss"].aggregate() == pytest.approx(loss.item())
    assert name == "flowrl_no_is" or wanted.weight.std() > 0


def test_micro_batches_and_ranks_give_the_gradient_of_one_batch(batch):
    advantage, config = advantages(batch, "flowrl"), actor("flowrl")

    def gradient(parts, dp_size):
        log_prob = batch["log_prob"].clone().requires_grad_()
        for rows in parts:
            data = actor_data(batch, advantage, rows, dp_size=dp_size)
            loss, _ = engine_workers.ppo_loss(config, model_output(log_prob, rows), data)
            (loss / dp_size).backward()  # FSDP's mean over the ranks
        return log_prob.grad

    whole = gradient([range(B)], 1)
    assert_grad_close(gradient([[3, 0], [1, 7, 5], [2, 6, 4]], 1), whole, rel=1e-6, row=1e-4)
    assert_grad_close(gradient([[0, 5, 2, 7], [1, 3, 4, 6]], 2), whole, rel=1e-6, row=1e-4)


def test_without_global_counts_the_loss_is_a_mean_over_the_sequences(batch):
    data = actor_data(batch, advantages(batch, "flowrl"), size=None)
    loss, _ = engine_workers.ppo_loss(actor("flowrl"), model_output(batch["log_prob"]), data)
    torch.testing.assert_close(loss.double(), specification(batch, batch["log_prob"]).loss, rtol=1e-5, atol=1e-6)


def test_verl_s_rollout_weights_are_the_second_weight(batch):
    weights = torch.linspace(0.1, 2.0, B)[:, None].expand(B, T)
    data = actor_data(batch, advantages(batch, "flowrl_no_is"), rollout_is_weights=weights)
    loss, metrics = engine_workers.ppo_loss(actor("flowrl_no_is"), model_output(batch["log_prob"]), data)
    delta = specification(batch, batch["log_prob"]).residual
    torch.testing.assert_close(loss.double(), (weights[:, 0].double() * delta.square()).mean(), rtol=1e-4, atol=1e-5)
    assert metrics["actor/flowrl_weight_max"].aggregate() == pytest.approx(2.0, rel=1e-4)


@pytest.mark.parametrize("name", ["flowrl_release_old_anchor_no_log_z", "flowrl_release_no_anchor_no_log_z"])
def test_rows_without_a_reference_need_none(batch, name):
    data = actor_data(batch, advantages(batch, name, keys=())).exclude("ref_log_prob")
    loss, _ = engine_workers.ppo_loss(actor(name, use_kl_loss=False), model_output(batch["log_prob"]), data)
    wanted = specification(batch, batch["log_prob"], None, preset=ours.PRESET_NAMES[name])
    torch.testing.assert_close(loss.double(), wanted.loss, rtol=1e-5, atol=1e-6)


def test_token_level_rows_take_verl_s_token_mean(batch):
    name = "flowrl_token_old_anchor_no_log_z"
    data = actor_data(batch, advantages(batch, name, keys=()))
    loss, _ = engine_workers.ppo_loss(actor(name, loss_agg_mode="token-mean"), model_output(batch["log_prob"]), data)
    wanted = specification(batch, batch["log_prob"], None, preset=ours.PRESET_NAMES[name])
    torch.testing.assert_close(loss.double(), wanted.loss, rtol=1e-5, atol=1e-6)


def test_settings_of_one_s_own_are_registered_under_one_s_own_name(batch):
    ours.register("mild", beta=2.0, clip="release")
    data = actor_data(batch, advantages(batch, "mild"))
    loss, _ = engine_workers.ppo_loss(actor("mild"), model_output(batch["log_prob"]), data)
    reward = group_normalize(batch["token_level_rewards"].sum(1).double(), GROUPS)
    old, ref = batch["old_log_probs"].double(), batch["ref_log_prob"].double()
    d = flowrl_loss(old, ref, reward, None, mask=mask_of(), beta=2.0, impl="reference").residual
    log_z = torch.cat([-d[g == GROUPS].mean().expand(4) for g in (0, 1)])
    wanted = specification(batch, batch["log_prob"], log_z, beta=2.0, clip="release")
    torch.testing.assert_close(loss.double(), wanted.loss, rtol=1e-5, atol=1e-6)


def test_verl_s_own_losses_and_estimators_are_left_alone(batch):
    vanilla = advantages(batch, "grpo")
    reward = group_normalize(batch["token_level_rewards"].sum(1), GROUPS)
    torch.testing.assert_close(vanilla, reward[:, None] * mask_of(), rtol=1e-4, atol=1e-5)
    data = actor_data(batch, vanilla)
    config = actor("vanilla", loss_agg_mode="token-mean")
    loss, _ = engine_workers.ppo_loss(config, model_output(batch["log_prob"]), data)
    padded = {"old_log_prob": batch["old_log_probs"], "log_prob": batch["log_prob"], "advantages": vanilla}
    wanted, _ = core_algos.get_policy_loss_fn("vanilla")(
        **padded, response_mask=mask_of().bool(), loss_agg_mode="token-mean", config=config
    )
    torch.testing.assert_close(loss, wanted)


def test_what_is_missing_is_said_with_what_to_set(batch):
    with pytest.raises(ValueError, match="ref_log_prob.*use_kl_loss=true and actor.kl_loss_coef=0.0"):
        advantages(batch, "flowrl", keys=("old_log_probs",))
    with pytest.raises(ValueError, match="old_log_probs.*bypass_mode"):
        advantages(batch, "flowrl", keys=("ref_log_prob",))
    advantage = advantages(batch, "flowrl")
    with pytest.raises(ValueError, match="ref_log_prob.*kl_loss_coef"):
        engine_workers.ppo_loss(
            actor("flowrl", use_kl_loss=False),
            model_output(batch["log_prob"]),
            actor_data(batch, advantage).exclude("ref_log_prob"),
        )
    with pytest.raises(ValueError, match="loss_agg_mode: wanted 'seq-mean-token-mean'"):
        engine_workers.ppo_loss(
            actor("flowrl", loss_agg_mode="token-mean"), model_output(batch["log_prob"]), actor_data(batch, advantage)
        )
    with pytest.raises(ValueError, match="global_batch_size: wanted"):
        engine_workers.ppo_loss(
            actor("flowrl"), model_output(batch["log_prob"]), actor_data(batch, advantage, dp_size=2, size=None)
        )
    fn = core_algos.get_policy_loss_fn("flowrl")
    with pytest.raises(RuntimeError, match="outside verl's ppo_loss"):
        fn(batch["old_log_probs"], batch["log_prob"], advantage, mask_of())


def test_the_example_config_is_one_of_verl_s(tiny_model, monkeypatch):
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import omega_conf_to_dataclass, validate_config
    from verl.workers.engine import EngineRegistry

    with initialize_config_dir(str(EXAMPLES), version_base=None):
        config = compose("verl_flowrl", [f"actor_rollout_ref.model.path={tiny_model}"])
    validate_config(config, need_reference_policy(config), need_critic(config))
    assert (need_reference_policy(config), need_critic(config)) == (True, False)
    worker = config.actor_rollout_ref
    model, actor = (omega_conf_to_dataclass(worker[name]) for name in ("model", "actor"))
    assert (actor.engine.strategy, worker.ref.strategy, worker.ref.fsdp_config.forward_only) == ("fsdp2", "fsdp2", True)
    assert actor.optim.override_optimizer_config["log_z_lr"] == 1e-4
    assert worker.rollout.log_prob_use_dynamic_bsz == worker.actor.use_dynamic_bsz
    # main_ppo hands this environment to every worker
    runtime = OmegaConf.merge(get_ppo_ray_runtime_env(config), config.ray_kwargs.ray_init.runtime_env)
    monkeypatch.setenv("VERL_ENGINE_VENDOR", runtime.env_vars.VERL_ENGINE_VENDOR)
    assert EngineRegistry.get_engine_cls(model.model_type, actor.engine.strategy).__name__ == "FlowRLEngine"
    for name in (config.algorithm.adv_estimator, actor.policy_loss.loss_mode):
        assert name in core_algos.ADV_ESTIMATOR_REGISTRY
        assert name in core_algos.POLICY_LOSS_REGISTRY
    assert EngineRegistry.get_engine_cls("value_model", "fsdp2").__name__ == "FSDPEngineWithValueHead"


def test_a_learned_log_z_is_the_one_beside_the_log_probs(batch):
    log_z = torch.linspace(-0.5, 2.0, B).requires_grad_()
    log_prob = batch["log_prob"].clone().requires_grad_()
    output = model_output(log_prob) | {"log_z": log_z}
    loss, _ = engine_workers.ppo_loss(
        actor("flowrl_learned"), output, actor_data(batch, advantages(batch, "flowrl_learned"))
    )
    wanted_log_z, wanted_at = log_z.detach().double().requires_grad_(), batch["log_prob"].double().requires_grad_()
    wanted = specification(batch, wanted_at, wanted_log_z)
    torch.testing.assert_close(loss.double(), wanted.loss, rtol=1e-5, atol=1e-6)
    for actual, expected in zip(
        torch.autograd.grad(loss, (log_prob, log_z)), torch.autograd.grad(wanted.loss, (wanted_at, wanted_log_z))
    ):
        assert_grad_close(actual, expected, rel=1e-5, row=1e-3)
    with pytest.raises(ValueError, match="log_z: wanted 'group', 'learned'"):
        ours.register("wrong", log_z="learned", preset="release_no_log_z")
