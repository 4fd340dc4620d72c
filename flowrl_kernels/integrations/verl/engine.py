"""An FSDP2 engine for verl 0.9.1: log-probs by `linear_logprob`, and the learned log Z. Not run on a GPU.

    VERL_ENGINE_VENDOR=flowrl python -m verl.trainer.main_ppo ... \
        actor_rollout_ref.model.external_lib=flowrl_kernels.integrations.verl.engine \
        actor_rollout_ref.actor.strategy=fsdp2 algorithm.adv_estimator=flowrl_learned \
        actor_rollout_ref.actor.policy_loss.loss_mode=flowrl_learned ...

(examples/verl_flowrl.yaml has the whole of it.) verl looks engines up by device and vendor, and imports `external_lib`
in each worker before it does. What differs from verl's own `FSDPEngineWithLMHead`:

- The forward returns log-probs of the response tokens, as verl's fused kernels do, and no logits. Positions that
  predict a prompt token are left out (0): nothing in verl's RL path reads them.
- An engine that trains has `log_z`, an MLP on each prompt's mean hidden state: an FSDP unit and a group of the
  optimiser of its own (`optim.override_optimizer_config.log_z_lr`), clipped on its own, in files of its own in the
  checkpoint. It is no part of `module`, so no export and no weight sync contains it. The loss finds its values in
  `model_output["log_z"]`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import types
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.core.types import LogProb
from flowrl_kernels.hf.head import call_head, check_head, head_scales, refuse_adapter
from flowrl_kernels.hf.packing import Probe
from flowrl_kernels.log_partition import LogPartition, prompt_mean
from flowrl_kernels.logprobs import linear_logprob

try:
    from torch.distributed.fsdp import fully_shard
    from transformers.utils import ModelOutput
    from verl.utils import tensordict_utils as tu
    from verl.utils.device import get_device_id
    from verl.utils.fs import copy_to_local, is_non_local
    from verl.utils.fsdp_utils import fsdp2_clip_grad_norm_
    from verl.workers.config.optimizer import build_optimizer
    from verl.workers.engine.base import EngineRegistry
    from verl.workers.engine.fsdp.transformer_impl import FSDPEngineWithLMHead
except ImportError as error:
    raise ImportError(f"flowrl_kernels.integrations.verl.engine was written for verl==0.9.1: {error}") from error

__all__ = ["FlowRLEngine"]


@dataclasses.dataclass
class Scored(ModelOutput):  # a ModelOutput, because FSDP looks for tensors in those
    """What the forward returns instead of logits."""

    log_probs: Tensor | None = None  # [1, N]
    entropy: Tensor | None = None  # [1, N]
    prompt_mean: Tensor | None = None  # [B, H] fp32


@EngineRegistry.register(model_type="language_model", backend="fsdp2", device="cuda", vendor="flowrl")
class FlowRLEngine(FSDPEngineWithLMHead):
    """verl's FSDP2 engine with a fused head and, unless it is forward-only, the learned log Z."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.log_z: LogPartition | None = None
        if self.ulysses_sequence_parallel_size > 1:
            wanted = "wanted 1: a prompt's mean needs all of its tokens"
            raise ValueError(f"ulysses_sequence_parallel_size: {wanted}; got {self.ulysses_sequence_parallel_size}")
        if not self.use_remove_padding:
            raise ValueError("use_remove_padding: wanted true, the packed layout that this engine scores; got false")
        if hasattr(self.model_config.hf_config, "vision_config"):
            raise ValueError("model.path: wanted a text model; got one with a vision_config: use verl's own engine")

    # the model and log Z

    def _build_module(self) -> Any:
        module = super()._build_module()
        _score_in_forward(module)
        return module

    def _build_lora_module(self, module: Any) -> Any:
        module = super()._build_lora_module(module)
        refuse_adapter(module.get_base_model())
        return module

    def _build_fsdp_module(self, module: Any) -> Any:
        module = super()._build_fsdp_module(module)
        if self.scaler is not None:
            raise ValueError("mixed_precision.param_dtype: wanted bf16 or fp32, for the loss is not rescaled; got fp16")
        _refuse_leaks(module, self._autocast_dtype)
        if not self.engine_config.forward_only:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.engine_config.seed)  # each rank keeps its shard of one and the same start
                self.log_z = LogPartition(self.model_config.hf_config.get_text_config().hidden_size)
            # fp32 in storage and in the products, whatever the model's mixed precision is. Sharded again after each
            # forward: a loss that leaves log Z alone has no backward to do it
            fully_shard(self.log_z.to(get_device_id()), mesh=self.device_mesh, reshard_after_forward=True)
        return module

    def _build_optimizer(self, module: Any) -> Any:
        """verl's optimiser with a second group: log Z at `log_z_lr` (the policy's rate if not set), without decay."""
        config = self.optimizer_config
        options = dict(config.override_optimizer_config or {})
        rate = options.pop("log_z_lr", config.lr)
        assert self.log_z is not None
        groups = [
            {"params": list(module.parameters())},
            {"params": list(self.log_z.parameters()), "lr": rate, "weight_decay": 0.0},
        ]
        return build_optimizer(groups, dataclasses.replace(config, override_optimizer_config=options or None))

    def optimizer_step(self) -> float:
        """Clips log Z's gradient by its own norm, then verl's step. Returns the policy's norm."""
        if self.log_z is not None:
            fsdp2_clip_grad_norm_(self.log_z.parameters(), max_norm=self.optimizer_config.clip_grad)
        return super().optimizer_step()

    # a micro-batch

    def prepare_model_inputs(self, micro_batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        for flag in ("distillation_use_topk", "calculate_sum_pi_squared"):
            if tu.get_non_tensor_data(data=micro_batch, key=flag, default=False):
                raise ValueError(f"{flag}: wanted false, for it needs logits and this engine makes none; got true")
        if isinstance(micro_batch["temperature"], Tensor):
            raise ValueError("temperature: wanted one number for the batch; got a tensor of one per sample")
        # the log-probs come out of the forward, as with verl's fused kernels: verl unpads and nests them
        tu.assign_non_tensor(micro_batch, use_fused_kernels=True)
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        model_inputs["with_entropy"] = tu.get_non_tensor_data(data=micro_batch, key="calculate_entropy", default=False)
        if "prompts" in micro_batch:
            offsets = micro_batch["input_ids"].offsets()  # [B + 1]
            is_prompt, predicts_response = _spans(offsets, _prompt_lengths(micro_batch), micro_batch["input_ids"])
            labels = model_inputs["shift_labels"].clone()  # [1, N], plus padding
            labels[0, len(predicts_response) :] = -100
            labels[0, : len(predicts_response)].masked_fill_(~predicts_response, -100)
            model_inputs |= {"shift_labels": labels, "prompts": (is_prompt, offsets)}
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Scored, output_args: dict[str, Any], micro_batch: Any, logits_processor_func: Any
    ) -> dict[str, Tensor]:
        model_output = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if self.log_z is not None and logits_processor_func is not None and output.prompt_mean is not None:
            mean = output.prompt_mean[:, None]  # [B, 1, H]: the mean of one is itself
            log_z = self.log_z(mean, torch.ones(mean.shape[:2], dtype=torch.bool, device=mean.device))
            # verl takes its outputs apart by sequence: one value each
            each = torch.arange(len(log_z) + 1, device=log_z.device)
            model_output["log_z"] = torch.nested.nested_tensor_from_jagged(log_z, offsets=each)
        return model_output

    # checkpoints

    def save_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """verl's checkpoint, whose optimiser files hold log Z's group, and this rank's shard of log Z."""
        super().save_checkpoint(local_path, *args, **kwargs)
        if self.log_z is not None and local_path is not None and self.checkpoint_manager.should_save_model:
            torch.save(self.log_z.state_dict(), self._log_z_file(local_path))
            torch.distributed.barrier()

    def load_checkpoint(self, local_path: str, *args: Any, **kwargs: Any) -> None:
        """Resumes log Z too. Raises FileNotFoundError for a checkpoint without one."""
        if self.log_z is not None and local_path is not None and self.checkpoint_manager.should_load_model:
            path = self._log_z_file(local_path)
            if not is_non_local(path) and not os.path.exists(path):
                raise FileNotFoundError(
                    f"{path}: wanted this rank's learned log Z; a checkpoint of verl's own engine, or of another "
                    "number of ranks, has none and cannot be resumed here"
                )
            self.log_z.load_state_dict(torch.load(copy_to_local(path), weights_only=False))
        super().load_checkpoint(local_path, *args, **kwargs)

    def _log_z_file(self, folder: str) -> str:
        manager = self.checkpoint_manager
        return os.path.join(folder, f"log_z_world_size_{manager.world_size}_rank_{manager.rank}.pt")


def _score_in_forward(module: Any) -> None:
    """Give a causal LM a forward that returns `Scored` where it is handed `shift_labels`."""
    theirs = module.forward
    scales = head_scales(module.config)
    check_head(module, scales, "model.path")

    @functools.wraps(theirs.__func__)  # verl reads the signature
    def forward(self, *args, shift_labels=None, temperature=1.0, with_entropy=False, prompts=None, **kwargs):
        if shift_labels is None:
            return theirs(*args, **kwargs)
        hidden = self.base_model(*args, **kwargs).last_hidden_state  # [1, N, H]
        head = self.get_output_embeddings()

        def score(states: Tensor) -> LogProb:
            logp, entropy = linear_logprob(
                states, head.weight.to(states.dtype), shift_labels, bias=getattr(head, "bias", None),
                temperature=temperature, entropy=with_entropy, **scales._asdict(),
            )  # fmt: skip
            return LogProb(logp.clone(), None if entropy is None else entropy.clone())  # FSDP warns about views

        out = call_head(head, score, hidden)
        mean = None if prompts is None else prompt_mean(hidden[0, : len(prompts[0])], *prompts)
        return Scored(log_probs=out.logp, entropy=out.entropy, prompt_mean=mean)

    module.forward = types.MethodType(forward, module)


@torch.no_grad()
def _refuse_leaks(module: Any, dtype: torch.dtype) -> None:
    """Raises for a model that lets packed sequences see each other: verl's packed rows tell them apart by positions.

    Tried on the sharded module, as training calls it: every rank takes part and finds the same.
    """

    def forward(ids: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        labels = (ids + 1) % module.config.get_text_config().vocab_size
        with torch.autocast(ids.device.type, dtype, enabled=dtype != torch.float32):
            out = module(
                input_ids=ids, position_ids=positions, attention_mask=None, use_cache=False, shift_labels=labels
            )
        return out.log_probs[..., None].float()

    training, text = module.training, module.config.get_text_config()
    module.eval()
    probe = Probe(forward, text.vocab_size, getattr(text, "max_position_embeddings", None), get_device_id())
    error = probe.error("positions", rows=[[0, 1, 2]])
    module.train(training)
    for unit in module.modules():
        if hasattr(unit, "reshard"):
            unit.reshard()
    tolerance = probe.tolerance(dtype)
    if not error <= tolerance:
        raise ValueError(
            f"model.path: {type(module).__name__} gives packed sequences other log-probs than alone (relative "
            f"difference {error:.2g}, tolerated {tolerance:.0e}): verl's packed layout would train it on its neighbours"
        )


def _prompt_lengths(data: Any) -> Tensor:
    """[B] tokens of each prompt, nested or padded on the left, as verl's `no_padding_2_padding` counts them."""
    prompts = data["prompts"]
    if prompts.is_nested:
        return prompts.offsets().diff()
    return data["attention_mask"][:, : prompts.shape[1]].sum(1)


def _spans(offsets: Tensor, prompt_lengths: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
    """(is part of the prompt, predicts a token of the response), both bool [N] over the packed sequences. No sync."""
    lengths, num = offsets.diff(), packed.values().shape[0]
    row = torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths, output_size=num)
    inside = torch.arange(num, device=offsets.device) - offsets[row]
    prompt = prompt_lengths.to(offsets.device)[row]
    return inside < prompt, (inside >= prompt - 1) & (inside < lengths[row] - 1)
