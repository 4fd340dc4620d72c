"""FlowRL in TRL: `FlowRLTrainer` over `GRPOTrainer`, and `patch_logprobs` for the log-probs of any TRL trainer.

TRL 1.16 computes per-token log-probs by a fused head (`trl.trainer.utils.add_fused_lm_head`). Both doors keep that
head's plumbing (label shift, soft-cap, scales, MoE loss, FSDP gathering) and exchange the one function under it for
`linear_logprob`; no loss of TRL's is copied here.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.core.types import LogProbStatistics
from flowrl_kernels.hf.head import HeadScales, check_head, head_scales, refuse_adapter
from flowrl_kernels.log_partition import LOG_Z_FILE, LogPartition
from flowrl_kernels.logprobs import linear_logprob
from flowrl_kernels.modules import FlowRLLoss

try:
    import trl
    from trl.trainer import utils as trl_utils
except ImportError as error:
    raise ImportError("flowrl_kernels.integrations.trl needs TRL: pip install 'trl>=1.16,<2'") from error

from accelerate.utils import is_peft_model
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import GRPOConfig, GRPOTrainer

__all__ = ["FlowRLConfig", "FlowRLMixin", "FlowRLTrainer", "patch_logprobs"]

HEAD = "_ChunkedLogProbFunction"
HEAD_ARGUMENTS = (
    "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping", "logit_scale",
    "outputs",
)  # fmt: skip
# what a vision-language batch carries besides ids and masks; handed through to TRL's own forward
MODEL_INPUTS = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles",
    "image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip
# options of GRPO's losses that mean nothing here: setting one raises instead of being ignored
UNUSED = (
    "epsilon", "epsilon_high", "delta", "importance_sampling_level", "off_policy_mask_threshold",
    "top_entropy_quantile", "entropy_coef", "use_adaptive_entropy", "use_bias_correction_kl",
)  # fmt: skip


def _check_version() -> None:
    function = getattr(trl_utils, HEAD, None)
    found = () if function is None else tuple(inspect.signature(function.forward).parameters)[1:]
    if found != HEAD_ARGUMENTS or not hasattr(trl_utils, "add_fused_lm_head"):
        raise ImportError(
            f"flowrl_kernels.integrations.trl was written for the fused head of TRL 1.16; TRL {trl.__version__} has "
            f"{'none' if function is None else f'one that takes {found}'}. Install trl==1.16.0"
        )


_check_version()


# the head ------------------------------------------------------------------------------------------------------------


class _Head:
    """Stands in for TRL's autograd function for one forward, and knows whether it was asked."""

    def __init__(self, theirs: Any, impl: str, scales: HeadScales):
        self.theirs = theirs
        self.impl = impl
        self.scales = scales
        self.used = False

    def apply(self, hidden, weight, bias, targets, temperature, chunk_size, softcap=None, logit_scale=1.0, outputs=()):
        """(log-probs, entropy, log_sum_sq_probs, mean_logits, is_top1), each [N] or None where it was not asked for.

        The scales are those that `check_head` has compared, not TRL's: it does not know every soft cap.
        """
        self.used = True
        logit_scale, softcap = self.scales
        # for the metrics of SFT, DPO and KTO, from the same products
        logged = "mean_logits" in outputs or "is_top1" in outputs
        out = linear_logprob(
            hidden, weight.to(hidden.dtype), targets, bias=bias, temperature=temperature, logit_scale=logit_scale,
            softcap=softcap, entropy="entropy" in outputs, statistics=logged, impl=self.impl,
        )  # fmt: skip
        sum_squares = None
        if "log_sum_sq_probs" in outputs:  # of DPO's use_weighting alone: a second forward, TRL's own
            with torch.no_grad():
                _, _, sum_squares, _, _ = self.theirs.apply(
                    hidden, weight, bias, targets, temperature, chunk_size, softcap, logit_scale, ("log_sum_sq_probs",)
                )
        mean_logits = is_top1 = None
        if isinstance(out, LogProbStatistics):
            mean_logits = out.mean_logits if "mean_logits" in outputs else None
            is_top1 = out.is_top1 if "is_top1" in outputs else None
        return out.logp, out.entropy, sum_squares, mean_logits, is_top1


@contextmanager
def _in_place_of_theirs(impl: str, scales: HeadScales) -> Iterator[_Head]:
    theirs = getattr(trl_utils, HEAD)
    head = _Head(theirs.theirs if isinstance(theirs, _Head) else theirs, impl, scales)
    setattr(trl_utils, HEAD, head)
    try:
        yield head
    finally:
        setattr(trl_utils, HEAD, theirs)


def _base(model: Any) -> Any:
    return model.get_base_model() if is_peft_model(model) else model


def _fuse(model: Any, impl: str, *, check: bool) -> None:
    """Give `model`, which has TRL's fused head, ours; `check`: after a look at its logits."""
    base = _base(model)
    theirs = base.forward
    if hasattr(theirs, "flowrl_impl"):
        raise ValueError("trainer: wanted a model whose log-probs are TRL's; got one that is already patched")
    # under mixed precision accelerate has wrapped the reference's forward, and kept the one below
    below = base.__dict__.get("_original_forward", theirs)
    if "fused_lm_head" not in inspect.signature(below, follow_wrapped=False).parameters:
        raise ValueError(
            f"trainer: wanted one whose model has TRL's fused head (GRPO, RLOO, SFT, DPO, KTO, async GRPO); got "
            f"{type(base).__name__} without one, so its log-probs come from logits and nothing could be patched"
        )
    refuse_adapter(base)
    scales = head_scales(base.config)
    if check:
        check_head(base, scales)

    @functools.wraps(theirs.__func__)  # generate() reads the model's own signature through the chain
    def forward(self, *args, fused_lm_head=False, **kwargs):
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        with _in_place_of_theirs(impl, scales) as head:
            output = theirs(*args, fused_lm_head=True, **kwargs)
        if not head.used:
            raise RuntimeError(f"TRL {trl.__version__} did not ask {HEAD} for its log-probs: install trl==1.16.0")
        return output

    forward.flowrl_impl = impl  # type: ignore[attr-defined]
    base.forward = types.MethodType(forward, base)


def patch_logprobs(trainer: Any, *, impl: str = "auto") -> Any:
    """Compute a TRL trainer's log-probs (policy and reference) by `linear_logprob`. Its loss stays its own.

    Call it once, right after the trainer is made. Works for trainers that use TRL's fused head: GRPO, RLOO, SFT, DPO,
    KTO and async GRPO. The token accuracy and mean logits that SFT, DPO and KTO log come from the same pass; only
    DPO's `use_weighting` takes a second forward of TRL's head, without gradient.

    Args:
        trainer: a trainer of TRL 1.16 with `model` and, perhaps, `ref_model`.
        impl: as in `linear_logprob`.

    Returns:
        the trainer.

    Raises:
        ValueError: no fused head, a head that `linear_logprob` does not know, a PEFT adapter on it, or patched before.
        RuntimeError: DeepSpeed ZeRO-3, which empties the head's weight outside the layer's own forward and backward.
    """
    if is_deepspeed_zero3_enabled():
        raise RuntimeError(
            "linear_logprob needs the whole lm_head.weight in forward and backward, and ZeRO-3 leaves it empty: use "
            "ZeRO-2 or FSDP2, or leave TRL's own head in place"
        )
    if not hasattr(trainer, "model") or not hasattr(trainer, "accelerator"):
        raise ValueError(f"trainer: wanted a TRL trainer; got {type(trainer).__name__}")
    for model in (trainer.model, getattr(trainer, "ref_model", None)):
        if model is not None:  # the reference is a copy, which accelerate may have wrapped or sharded by now
            _fuse(trainer.accelerator.unwrap_model(model), impl, check=model is trainer.model)
    return trainer


# the trainer ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class FlowRLConfig(GRPOConfig):
    """`GRPOConfig` with FlowRL's settings. `beta` is FlowRL's here: the factor of the reward, not a KL coefficient.

    The reward is TRL's advantage: normalised per prompt (with 1e-4 beside the standard deviation, where FlowRL's code
    has 1e-6) under `scale_rewards="group"`, only centred under "none". Options of GRPO's own losses raise when set.
    """

    beta: float = dataclasses.field(default=15.0, metadata={"help": "Factor of the reward in FlowRL's residual."})
    loss_type: str = dataclasses.field(default="flowrl", metadata={"help": "Always 'flowrl'."})
    use_bias_correction_kl: bool = dataclasses.field(default=False, metadata={"help": "Not used: there is no KL."})
    log_z: str = dataclasses.field(
        default="learned",
        metadata={"help": "'learned' (an MLP on the prompt), 'group' (mean over the prompt's samples) or 'none'."},
    )
    log_z_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "Learning rate of the learned log Z; `learning_rate` if None."}
    )
    log_z_detach: bool = dataclasses.field(
        default=False, metadata={"help": "Stop log Z's gradient at the hidden states."}
    )
    flowrl_kwargs: dict | str | None = dataclasses.field(
        default=None, metadata={"help": "Further settings of flowrl_loss: preset, clip, ratio, anchor, ..."}
    )
    flowrl_impl: str = dataclasses.field(default="auto", metadata={"help": "Implementation of the kernels."})

    _VALID_DICT_FIELDS = GRPOConfig._VALID_DICT_FIELDS + ["flowrl_kwargs"]

    def __post_init__(self):
        super().__post_init__()
        if self.log_z not in ("learned", "group", "none"):
            raise ValueError(f"log_z: wanted 'learned', 'group' or 'none'; got {self.log_z!r}")
        if self.loss_type != "flowrl":
            raise ValueError(f"loss_type: wanted 'flowrl' (GRPOTrainer has the others); got {self.loss_type!r}")
        if not self.beta > 0.0:
            raise ValueError(f"beta: wanted a number above 0 (the factor of FlowRL's reward); got {self.beta}")
        for field in dataclasses.fields(FlowRLConfig):
            if field.name in UNUSED and getattr(self, field.name) != field.default:
                got = getattr(self, field.name)
                raise ValueError(f"{field.name}: wanted {field.default!r}, FlowRL's loss does not use it; got {got!r}")


class FlowRLMixin:
    """FlowRL's loss over a `GRPOTrainer`: put it before the trainer class, and hand in a `FlowRLConfig`.

    What is replaced: the loss, and the log-probs under it. What is TRL's: rollouts, rewards, tools, vLLM, logging.
    vLLM's importance weights, truncated or masked as TRL is configured, are the loss's second weight.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self_: Any = self
        config = self_.args
        if not isinstance(config, FlowRLConfig):
            raise TypeError(f"args: wanted a FlowRLConfig; got {type(config).__name__}")
        patch_logprobs(self, impl=config.flowrl_impl)
        self.flowrl_loss = self._make_loss()
        self.log_z: LogPartition | None = None
        if config.log_z == "learned":
            self.log_z = self._make_log_z(self_.model.config.get_text_config().hidden_size)
            self_.add_callback(_LogZSteps(self))

    def _make_loss(self) -> FlowRLLoss:
        self_: Any = self
        settings = {"beta": self_.args.beta, "impl": self_.args.flowrl_impl, **(self_.args.flowrl_kwargs or {})}
        if self_.use_vllm and self_.vllm_importance_sampling_correction:
            by_token = self_.vllm_importance_sampling_mode.startswith("token")
            settings |= {"tis": "token" if by_token else "mean", "tis_cap": 1e30}  # TRL has capped it
        return FlowRLLoss(**settings)

    def _make_log_z(self, hidden_size: int) -> LogPartition:
        self_: Any = self
        if self_.is_deepspeed_enabled or self_.is_fsdp_enabled:
            raise ValueError(
                "log_z: wanted 'group' or 'none' under DeepSpeed and FSDP, which own the optimiser's parameters; got "
                "'learned'. (flowrl_kernels.trainer shards a learned log Z.)"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self_.args.seed)  # TRL seeds each rank differently; log Z must start equal
            log_z = LogPartition(hidden_size, detach=self_.args.log_z_detach)
        return log_z.to(self_.accelerator.device)

    # log-probs and log Z

    def _policy(self, model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        self_: Any = self
        return self_._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **{name: inputs.get(name) for name in MODEL_INPUTS},
            **options,
        )

    @contextmanager
    def _hidden_states(self, model: Any) -> Iterator[list[Tensor]]:
        """Collects the backbone's final-norm states [B, P + T, H] of the forwards inside."""
        seen: list[Tensor] = []
        backbone = _base(self.accelerator.unwrap_model(model)).base_model  # type: ignore[attr-defined]
        hook = backbone.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
        try:
            yield seen
        finally:
            hook.remove()

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self_: Any = self
        mask = _response_mask(inputs)  # [B, T]
        with self._hidden_states(model) as hidden:
            logp, entropy, aux_loss = self._policy(
                model, inputs, compute_entropy=True, compute_aux_loss=self_.aux_loss_enabled
            )
        log_z = inputs.get("log_z")
        if self.log_z is not None:
            width = inputs["prompt_ids"].size(1)
            log_z = self.log_z(hidden[0][:, :width].to(logp.device), inputs["prompt_mask"])
        # equal micro-batches: dividing by B times their number gives the gradient of one big batch
        mode = "train" if self_.model.training else "eval"
        steps = self_.current_gradient_accumulation_steps if mode == "train" else 1
        old = inputs.get("old_per_token_logps")  # left out by TRL where the policy is still the one that sampled
        out = self.flowrl_loss(
            logp,
            inputs["ref_per_token_logps"],
            inputs["advantages"].to(logp.dtype),
            log_z,
            logp_old=logp.detach() if old is None else old,
            logp_sampler=_sampler_logps(inputs),
            mask=mask,
            normalizer=float(len(mask) * steps),
        )
        loss = out.loss
        metrics = {f"flowrl/{name}": value for name, value in out.metrics.items()}
        metrics["flowrl/residual_squared"] = out.residual.square().mean()
        metrics["flowrl/loss"] = out.loss.detach() * steps
        tokens = torch.stack([(entropy.detach() * mask).sum(), mask.sum().to(entropy.dtype)])
        if self_.aux_loss_enabled:
            loss = loss + self_.router_aux_loss_coef * aux_loss / steps
            metrics["aux_loss"] = aux_loss.detach()
        self._record(mode, metrics, tokens)
        return loss

    def _record(self, mode: str, metrics: dict[str, Tensor], tokens: Tensor) -> None:
        """Means over the ranks into TRL's log: one reduction and one copy to the host."""
        self_: Any = self
        both = torch.cat([torch.stack([value.float() for value in metrics.values()]), tokens.float()])
        *values, entropy_sum, count = self_.accelerator.reduce(both, reduction="mean").tolist()
        for name, value in zip(metrics, values):
            self_._metrics[mode][name].append(value)
        self_._metrics[mode]["entropy"].append(entropy_sum / max(count, 1e-9))

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's rewards [B over all ranks, functions], of which those without any are remembered."""
        rewards = super()._calculate_rewards(*args, **kwargs)  # type: ignore[misc]
        if rewards.isinf().any():
            raise ValueError("reward_funcs: wanted finite numbers, or None for a completion without one; got inf")
        self._unscorable = rewards.isnan().all(1)
        return rewards

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        """TRL's rollouts; for the group's log Z also the samples' log-probs and the mean over each prompt's.

        A completion for which every reward function returned None (or NaN) has no residual. TRL gives it an advantage
        of 0, which its losses multiply with; here it is masked out.
        """
        self_: Any = self
        output = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        own = len(output["advantages"])
        output["unscorable"] = self._unscorable[self_.accelerator.process_index * own :][:own]
        if self_.args.log_z != "group":
            return output
        train = self_.model.training
        if "old_per_token_logps" not in output:
            size = self_.args.per_device_train_batch_size if train else self_.args.per_device_eval_batch_size
            with torch.no_grad():
                output["old_per_token_logps"] = self._policy(self_.model, output, batch_size=size)[0]
        old, mask = output["old_per_token_logps"], _response_mask(output)
        with torch.no_grad():
            # the residual without log Z; its mean over the group, sign turned, is the VarGrad estimate
            flow = self.flowrl_loss(
                old, output["ref_per_token_logps"], output["advantages"].to(old.dtype), torch.zeros_like(old[:, 0]),
                logp_old=old, logp_sampler=old if "tis" in self.flowrl_loss.settings else None, mask=mask,
            ).residual  # fmt: skip
        used = (mask.sum(1) > 0).to(flow.dtype)
        size = self_.num_generations if train else self_.num_generations_eval
        total, count = self_.accelerator.gather(torch.stack([-flow * used, used], 1)).view(-1, size, 2).sum(1).T
        start = self_.accelerator.process_index * len(flow)
        output["log_z"] = (total / count.clamp_min(1.0)).repeat_interleave(size)[start : start + len(flow)]
        return output

    # optimiser and checkpoints

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Add log Z's group to the optimiser, then TRL's scheduler over all groups."""
        self_: Any = self
        if self.log_z is not None:
            if self_.lr_scheduler is not None:
                raise ValueError("optimizers: wanted (optimizer, None), for log Z joins the optimiser; got a scheduler")
            inner = getattr(self_.optimizer, "optimizer", self_.optimizer)
            known = {id(p) for group in inner.param_groups for p in group["params"]}
            rate = self_.args.log_z_learning_rate
            own = [p for p in self.log_z.parameters() if id(p) not in known]
            if own:
                rate = self_.args.learning_rate if rate is None else rate
                inner.add_param_group({"params": own, "lr": rate, "weight_decay": 0.0})
        return super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self_: Any = self
        if self.log_z is not None and self_.args.should_save:
            folder = os.path.join(self_._get_output_dir(trial=trial), f"checkpoint-{self_.state.global_step}")
            save_file(self.log_z.state_dict(), os.path.join(folder, LOG_Z_FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: Any) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.log_z is not None and checkpoint is not None:
            path = os.path.join(checkpoint, LOG_Z_FILE)
            if not os.path.exists(path):
                raise FileNotFoundError(
                    f"{path}: wanted the learned log Z of this run; resume with the log_z setting it was saved with"
                )
            self.log_z.load_state_dict(load_file(path))


class _LogZSteps(TrainerCallback):
    """Log Z lives outside the model, so what the Trainer does to the model's gradients is done to its own here."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        accelerator, parameters = self.trainer.accelerator, list(self.trainer.log_z.parameters())
        if accelerator.num_processes > 1:
            for p in parameters:
                p.grad = accelerator.reduce(torch.zeros_like(p) if p.grad is None else p.grad, reduction="mean")
        if args.max_grad_norm and args.max_grad_norm > 0:
            torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.log_z.zero_grad()


def _response_mask(inputs: dict[str, Any]) -> Tensor:
    """bool [B, T]: completion tokens that the policy wrote, of completions that have a reward."""
    mask = inputs["completion_mask"]
    mask = (mask * inputs["tool_mask"] if "tool_mask" in inputs else mask).bool()
    return mask & ~inputs["unscorable"][:, None] if "unscorable" in inputs else mask


def _sampler_logps(inputs: dict[str, Any]) -> Tensor | None:
    """Log-probs [B, T] whose ratio to the old ones is vLLM's importance weight as TRL left it ([B, T] or [B, 1])."""
    ratio = inputs.get("importance_sampling_ratio")
    if ratio is None:
        return None
    old = inputs["old_per_token_logps"]
    return old - ratio.clamp_min(1e-26).log().expand_as(old)  # e^-60 is 0 to the loss, as a masked sequence should be


class FlowRLTrainer(FlowRLMixin, GRPOTrainer):
    """`GRPOTrainer` with FlowRL's loss. Same arguments; `args` is a `FlowRLConfig`."""

    _name = "FlowRL"
    _tag_names = ["trl", "flowrl"]  # noqa: RUF012
    _paper = {  # noqa: RUF012
        "title": "FlowRL: Matching Reward Distributions for LLM Reasoning",
        "id": "2509.15207",
        "citation": "",
    }
