"""FlowRL in verl 0.9: the policy losses `flowrl*` and the advantage estimators of the same names.

verl loads this module on `import verl` (entry point `verl.plugins`, or VERL_USE_EXTERNAL_MODULES). Importing it
registers everything where verl is installed. A run then needs:

    algorithm.adv_estimator=flowrl                            # normalises rewards, folds in the group's log Z
    actor_rollout_ref.actor.policy_loss.loss_mode=flowrl
    actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-mean
    actor_rollout_ref.actor.use_kl_loss=true                  # verl then computes reference log-probs
    actor_rollout_ref.actor.kl_loss_coef=0.0

verl's hook for policy losses is given neither the reference's log-probs nor the prompts, and its hook for estimators
no log-probs. So `ppo_loss` and `compute_advantage` of verl are wrapped to remember what they were called with; what
they compute is verl's own. log Z is the group's estimate (detached). The learned one, `flowrl_learned`, needs hidden
states, which no loss of verl sees: `integrations.verl.engine` has the engine that hands it over.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.advantages import group_normalize
from flowrl_kernels.losses import flowrl_loss
from flowrl_kernels.presets import PRESETS, named

__all__ = ["PRESET_NAMES", "ppo_loss", "register"]

# verl's loss name -> row of PRESETS. Others: register("my_name", preset=..., beta=...) in a module of your own.
PRESET_NAMES = {
    "flowrl": "paper",
    "flowrl_release": "release",
    "flowrl_unclipped": "unclipped",
    "flowrl_no_is": "no_is",
    "flowrl_hard": "hard",
    "flowrl_release_no_log_z": "release_no_log_z",
    "flowrl_release_old_anchor": "release_old_anchor",
    "flowrl_release_old_anchor_no_log_z": "release_old_anchor_no_log_z",
    "flowrl_release_no_anchor_no_log_z": "release_no_anchor_no_log_z",
    "flowrl_token_old_anchor_no_log_z": "token_old_anchor_no_log_z",
    "flowrl_token_no_anchor_no_log_z": "token_no_anchor_no_log_z",
}
_ppo_loss: ContextVar[Any] = ContextVar("ppo_loss", default=None)  # arguments: data (TensorDict), model_output
_compute_advantage: ContextVar[Any] = ContextVar("compute_advantage", default=None)  # arguments: data (DataProto)


def register(name: str, *, log_z: str | None = "group", **settings: Any) -> None:
    """Register a policy loss and an advantage estimator called `name` in verl.

    Args:
        name: for `policy_loss.loss_mode` and `algorithm.adv_estimator`.
        log_z: "group"; "learned", with the engine of `integrations.verl.engine`; or None to go without. Rows that have
            no log Z go without.
        settings: of `flowrl_loss`: preset, beta, clip, ratio, anchor, ...

    Raises:
        ImportError: verl is not installed, or is one whose hooks differ.
        ValueError: another `log_z`, or "learned" for a row without one.
    """
    core = _verl("verl.trainer.ppo.core_algos")
    row = named(settings.get("preset") or "paper")
    if log_z not in ("group", "learned", None) or (log_z == "learned" and row.log_z is None):
        raise ValueError(f"log_z: wanted 'group', 'learned' (for a row that has log Z) or None; got {log_z!r}")
    if row.log_z is None:
        log_z = None
    beta = settings.get("beta", row.beta)
    anchor = settings.get("anchor", row.anchor)
    flow = {"beta": beta, "anchor": anchor, "length_normalize": settings.get("length_normalize", row.scale is None)}
    wanted_mode = "token-mean" if row.level == "token" else "seq-mean-token-mean"

    def policy_loss(
        old_log_prob: Tensor,  # [B, T]
        log_prob: Tensor,  # [B, T]
        advantages: Tensor,  # [B, T], one value per sequence
        response_mask: Tensor,  # [B, T]
        loss_agg_mode: str = wanted_mode,
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # [B, T]
    ) -> tuple[Tensor, dict[str, Any]]:
        if loss_agg_mode != wanted_mode:
            raise ValueError(f"loss_agg_mode: wanted {wanted_mode!r} for {name}, got {loss_agg_mode!r}")
        mask = response_mask.bool()
        tis: dict[str, Any] = {}
        if rollout_is_weights is not None:  # verl has truncated them; per sequence they are equal along T
            sampler = old_log_prob - rollout_is_weights.clamp_min(1e-26).log()
            tis = {"tis": "token", "tis_cap": 1e30, "logp_sampler": sampler}
        info = {} if config is None else config.global_batch_info
        out = flowrl_loss(
            log_prob.float(),
            _reference(name, log_prob) if anchor == "ref" else None,
            sequence_value(advantages, mask),
            _learned_log_z(name) if log_z == "learned" else None,  # the group's is folded into the advantages
            logp_old=old_log_prob.float(),
            mask=mask,
            normalizer=_normalizer(info, mask, row.level),
            **settings,
            **tis,
        )
        loss = out.loss.to(log_prob.dtype)
        return loss, _host(out.metrics)

    def estimate(
        token_level_rewards: Tensor,  # [B, T]
        response_mask: Tensor,  # [B, T]
        index: Any = None,  # [B] prompt ids, any hashable
        config: Any = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        if index is None:
            raise ValueError(f"index: wanted the prompts' uid for adv_estimator={name}; got None")
        with torch.no_grad():
            mask = response_mask.bool()
            ids = {uid: i for i, uid in enumerate(dict.fromkeys(list(index)))}
            groups = torch.tensor([ids[uid] for uid in index], device=mask.device)
            by_std = True if config is None else config.get("norm_adv_by_std_in_grpo", True)
            reward = group_normalize((token_level_rewards.float() * mask).sum(-1), groups, scale=bool(by_std))
            if log_z == "group":
                reward = reward - _group_log_z(name, reward, groups, mask, flow) / beta
            advantages = reward[:, None] * mask
        return advantages, advantages

    core.register_policy_loss(name)(policy_loss)
    core.ADV_ESTIMATOR_REGISTRY[name] = estimate  # register_adv_est refuses a name twice, and a module may be reloaded


def sequence_value(advantages: Tensor, mask: Tensor) -> Tensor:
    """[B] the mean over response tokens of verl's [B, T] advantages (equal along T for outcome rewards)."""
    total = torch.where(mask, advantages.double(), 0.0).sum(1)
    return (total / mask.sum(1).clamp_min(1)).float()


def ppo_loss(config: Any, model_output: Any, data: Any, dp_group: Any = None) -> tuple[Tensor, dict[str, Any]]:
    """verl's own `ppo_loss`, on a batch whose `ref_log_prob` FlowRL can see.

    For `worker.set_loss_fn(partial(ppo_loss, config=actor_config))`. Where the plug-in is loaded, every place in verl
    that takes `verl.workers.utils.losses.ppo_loss` gets this one anyway.
    """
    return _verl("verl.workers.utils.losses").ppo_loss(config, model_output, data, dp_group)


def _group_log_z(name: str, reward: Tensor, groups: Tensor, mask: Tensor, settings: dict[str, Any]) -> Tensor:
    """The group's mean of beta r + mean(anchor - old), from the batch that is being scored. [B]"""
    call = _compute_advantage.get()
    if call is None:
        raise RuntimeError(f"{name}: called outside verl's compute_advantage, so there are no log-probs for log Z")
    data = call["data"]
    for key in ("old_log_probs", "ref_log_prob") if settings["anchor"] == "ref" else ("old_log_probs",):
        if key not in list(data.batch.keys()):
            raise ValueError(f"{key}: wanted in the batch, for the log Z of adv_estimator={name}. {_HOW[key]}")
    old, ref = data.batch["old_log_probs"].float(), data.batch.get("ref_log_prob", None)
    common = {"logp_old": old, "mask": mask, **settings}
    ref = None if ref is None else ref.float()
    centred = flowrl_loss(old, ref, reward, "group", groups=groups, **common).residual
    return centred - flowrl_loss(old, ref, reward, None, **common).residual


_HOW = {
    "old_log_probs": "Leave algorithm.rollout_correction.bypass_mode off",
    "ref_log_prob": "Set actor.use_kl_loss=true and actor.kl_loss_coef=0.0, so that verl computes it",
}


def _call(name: str) -> Any:
    call = _ppo_loss.get()
    if call is None:
        raise RuntimeError(
            f"{name}: called outside verl's ppo_loss, so there are no reference log-probs and no log Z. Use "
            "flowrl_kernels.integrations.verl.ppo_loss as the worker's loss, or an old-anchor loss"
        )
    return call


def _learned_log_z(name: str) -> Tensor:
    """[B] what the engine put beside the log-probs."""
    value = _call(name)["model_output"].get("log_z")
    if value is None:
        raise ValueError(
            f"log_z: wanted in the model's output, for loss_mode={name}. Export VERL_ENGINE_VENDOR=flowrl and set "
            "model.external_lib=flowrl_kernels.integrations.verl.engine, actor.strategy=fsdp2"
        )
    return value.values() if value.is_nested else value


def _reference(name: str, like: Tensor) -> Tensor:
    data = _call(name)["data"]
    if "ref_log_prob" not in list(data.keys()):
        raise ValueError(f"ref_log_prob: wanted in the batch, for loss_mode={name}. {_HOW['ref_log_prob']}")
    ref = data.select("ref_log_prob").to_padded_tensor()["ref_log_prob"]
    if ref.shape[1] < like.shape[1]:
        ref = torch.nn.functional.pad(ref, (0, like.shape[1] - ref.shape[1]))
    return ref[:, : like.shape[1]].float()


def _normalizer(info: dict, mask: Tensor, level: str) -> Tensor | float:
    """What verl's agg_loss divides by, over dp_size: FSDP averages gradients over the ranks."""
    key = "batch_num_tokens" if level == "token" else "global_batch_size"
    total, ranks = info.get(key), info.get("dp_size") or 1
    if total is None:
        if ranks > 1:
            raise ValueError(f"{key}: wanted in config.global_batch_info where dp_size is {ranks}; got None")
        total = mask.sum() if level == "token" else mask.any(1).sum()
    return torch.as_tensor(total, dtype=torch.float32, device=mask.device).clamp_min(1.0) / ranks


def _host(metrics: dict[str, Tensor]) -> dict[str, float]:
    """One copy to the host for all of them: verl's metrics are Python numbers."""
    values = torch.stack([value.float() for value in metrics.values()]).tolist()
    return {f"actor/flowrl_{name}": value for name, value in zip(metrics, values)}


def _verl(module: str) -> Any:
    if importlib.util.find_spec("verl") is None:
        raise ImportError("flowrl_kernels.integrations.verl needs verl: pip install verl==0.9.1")
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"flowrl_kernels.integrations.verl was written for verl 0.9.1: {error}") from error


def _remember(module: str, function: str, slot: ContextVar[Any]) -> None:
    """Wrap `module.function` so that `slot` holds its arguments by name while it runs."""
    home = _verl(module)
    theirs: Callable[..., Any] | None = getattr(home, function, None)
    if theirs is None:
        raise ImportError(f"flowrl_kernels.integrations.verl was written for verl 0.9.1: no {module}.{function} here")
    if hasattr(theirs, "flowrl_slot"):
        return
    signature = inspect.signature(theirs)

    @functools.wraps(theirs)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        token = slot.set(signature.bind(*args, **kwargs).arguments)
        try:
            return theirs(*args, **kwargs)
        finally:
            slot.reset(token)

    wrapped.flowrl_slot = slot.name  # type: ignore[attr-defined]
    for loaded in list(sys.modules.values()):  # also where it was imported by name
        if getattr(loaded, "__name__", "").startswith("verl.") and getattr(loaded, function, None) is theirs:
            setattr(loaded, function, wrapped)


def _install() -> None:
    _remember("verl.workers.utils.losses", "ppo_loss", _ppo_loss)
    try:
        _remember("verl.trainer.ppo.ray_trainer", "compute_advantage", _compute_advantage)
    except ImportError as error:  # a worker without the trainer's extras scores nothing
        logging.getLogger(__name__).info("FlowRL's advantage estimators cannot be used here: %s", error)
    for name, preset in PRESET_NAMES.items():
        assert preset in PRESETS
        register(name, preset=preset)
    register("flowrl_learned", log_z="learned")


if importlib.util.find_spec("verl") is not None:
    try:
        _install()
    except Exception as error:  # verl logs a failed plug-in at DEBUG, where nobody sees it
        logging.getLogger(__name__).warning("FlowRL's losses are not registered in verl: %s", error)
        raise
