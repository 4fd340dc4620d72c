"""Modules over the losses, and the network that learns log Z."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowrl_kernels import checks
from flowrl_kernels.functional import linear_logprob
from flowrl_kernels.layout import segments_of
from flowrl_kernels.linear_loss import linear_residual
from flowrl_kernels.losses import check_settings, flowrl_loss, no_tangent
from flowrl_kernels.presets import number
from flowrl_kernels.types import LossOutput

__all__ = ["FlowRLLoss", "LinearFlowRLLoss", "LogPartition"]


class FlowRLLoss(nn.Module):
    """`flowrl_loss` with its settings held: `FlowRLLoss(preset="release")(logp, logp_ref, reward, log_z, ...)`.

    The constructor takes the settings (preset, beta, ratio, clip, length_normalize, anchor, phi, tis, tis_cap, impl),
    the call takes the tensors (logp_old, mask or cu_seqlens, groups, normalizer, logp_sampler) and cp_group.
    """

    def __init__(self, **settings: Any):
        super().__init__()
        check_settings(type(self).__name__, settings)
        self.settings = settings

    def forward(
        self, logp: Tensor, logp_ref: Tensor | None, reward: Tensor, log_z: Any = ..., **tensors: Any
    ) -> LossOutput:
        return flowrl_loss(logp, logp_ref, reward, log_z, **tensors, **self.settings)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class LinearFlowRLLoss(FlowRLLoss):
    """The FlowRL loss from hidden states: log-probs, residual and gradients without a vocabulary-sized tensor.

    Args of the constructor: `temperature`, `epsilon` (see `linear_logprob`), those of `FlowRLLoss`, and `single_pass`.
    With it, where gradients are wanted and epsilon is 0, `chunked` and `triton` make the logits of whole sequences
    once (6NHV instead of 8NHV) and hold them in a buffer of 2^26 numbers (2^30 on a GPU); logp has the same bits. Of a
    sequence longer than the buffer allows (7067 tokens at V = 151936) the logits are made twice, of it alone. The whole
    batch takes two passes where its sequences depend on each other (group-centred, token-level without normalizer) and
    do not fit together, or where such a long sequence is float16; the log (`flowrl_kernels`, INFO) says so once. A
    packed batch's `cu_seqlens` is read on the host once, to cut it into chunks; the padded layout waits for nothing.

    The gradients are made in the forward and multiplied by the incoming one in the backward, with no copy unless the
    graph is retained. One pass has first derivatives only, and says so; impl="reference" has all of them.
    """

    def __init__(self, *, temperature: float = 1.0, epsilon: float = 0.0, single_pass: bool = True, **settings: Any):
        super().__init__(**settings)
        if not isinstance(temperature, Tensor) or temperature.dim() == 0:
            temperature = checks.positive("temperature", number("temperature", temperature))
        epsilon = number("epsilon", epsilon)
        if not 0.0 <= epsilon < 1.0:
            checks.fail("epsilon", "a number in [0, 1)", epsilon)
        if single_pass not in (True, False):
            checks.fail("single_pass", "True or False", repr(single_pass))
        self.single_pass = single_pass
        self.temperature = temperature
        self.epsilon = epsilon

    def forward(  # type: ignore[override]
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        logp_ref: Tensor | None,
        reward: Tensor,
        log_z: Any = ...,
        *,
        logp_old: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        groups: Tensor | None = None,
        normalizer: Tensor | float | tuple[float, float] | None = None,
        logp_sampler: Tensor | None = None,
        bias: Tensor | None = None,
        temperature: float | Tensor | None = None,
        logit_scale: float = 1.0,
        softcap: float | None = None,
        main_grad: Tensor | None = None,
        report: Tensor | None = None,
        cp_group: Any = None,
    ) -> LossOutput:
        """The loss of response positions only.

        Args:
            hidden: [B, T, H] with `mask` [B, T], or packed [N, H] with `cu_seqlens`: what predicts each token.
            weight: [V, H] the head.
            target: [B, T] or [N] the sampled token ids. Masked-out positions are not computed, and may hold anything in
                any tensor.
            logp_ref, reward, log_z, logp_old, mask, cu_seqlens, groups, normalizer, logp_sampler, cp_group: as in
                `flowrl_loss`. With cp_group it takes two passes.
            bias, temperature, logit_scale, softcap, main_grad, report: as in `linear_logprob`; main_grad takes two
                passes.
        """
        checks.floating("hidden", hidden)
        ids = checks.integers("target", target, tuple(hidden.shape[:-1]))
        if mask is not None:
            checks.plain("mask", mask)
            if mask.shape != ids.shape:
                checks.fail("mask", f"shape {tuple(ids.shape)} as target has", checks.shape(mask))
            ids = ids.long().masked_fill(~mask.to(torch.bool), -100)
        temperature = self.temperature if temperature is None else temperature
        if mask is not None and isinstance(temperature, Tensor) and temperature.shape == ids.shape:
            temperature = temperature.masked_fill(~mask.to(torch.bool), 1.0)
        if main_grad is not None and isinstance(weight, Tensor) and not weight.requires_grad:
            checks.fail("main_grad", "None beside a weight that wants no gradient", "a tensor")
        if report is not None:
            checks.floating("report", report, dims=1)
            if report.shape != (3,):
                checks.fail("report", "shape (3,)", checks.shape(report))
        tensors: dict[str, Any] = {
            "logp_old": logp_old, "mask": mask, "cu_seqlens": cu_seqlens, "groups": groups, "normalizer": normalizer,
            "logp_sampler": logp_sampler,
        }  # fmt: skip
        head: dict[str, Any] = {
            "bias": bias,
            "temperature": temperature,
            "logit_scale": number("logit_scale", logit_scale),
            "softcap": None if softcap is None else number("softcap", softcap),
        }
        if self.settings.get("impl", "auto") != "reference":
            for name, value in (("hidden", hidden), ("weight", weight), ("bias", bias), ("log_z", log_z)):
                no_tangent(name, value)
        if self.single_pass and self.epsilon == 0.0 and main_grad is None and cp_group is None:
            out = linear_residual(hidden, weight, ids, logp_ref, reward, log_z, tensors, head, self.settings)
            if out is not None:
                if report is not None:  # as an exact backward says
                    report.copy_(report.new_tensor([0.0, 1.0, 0.0]))
                return out
        logp = linear_logprob(
            hidden,
            weight,
            ids,
            epsilon=self.epsilon,
            report=report,
            main_grad=main_grad,
            impl=self.settings.get("impl", "auto"),
            **head,
        ).logp
        return super().forward(logp, logp_ref, reward, log_z, cp_group=cp_group, **tensors)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, epsilon={self.epsilon}, {super().extra_repr()}"


LOG_Z_FILE = "flowrl.log_z"  # no *.safetensors, *.bin, *.pt: servers load all of those as the language model's


def _by_place(name: str) -> tuple[bool, int, str]:
    """body.0.bias, body.0.weight, body.2.bias, ..., out.weight."""
    part = name.split(".")
    return part[0] != "body", int(part[1]) if part[1].isdigit() else 0, part[-1]


class LogPartition(nn.Module):
    """log Z(x): an MLP on the mean of the prompt's final-norm hidden states (arXiv 2509.15207, section 3).

    Args:
        hidden_size: H of the states.
        layers: linear layers, 3 in the paper; all but the last are H wide and followed by GELU.
        layer_norm: a LayerNorm after each GELU, as in the authors' code.
        dropout: dropout after each of these layers, 0.1 in the authors' code.
        detach: stop the gradient at the hidden states. The authors' code lets it flow, and reports lower accuracy
            without it.
        normalize: divide each prompt's mean state by its root mean square. What a step of the optimiser does to log Z
            then no longer depends on the size of a model's states; docs/trainer.md has measurements, and the rate by
            width. Off, as in the paper and the authors' code.

    The last layer starts at zero, so that log Z starts at 0: with pi = pi_ref the residual then starts at -beta r.
    (The authors' code keeps PyTorch's default there.) Parameters may be any float dtype; the output is fp32.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        layers: int = 3,
        layer_norm: bool = False,
        dropout: float = 0.0,
        detach: bool = False,
        normalize: bool = False,
    ):
        super().__init__()
        self.normalize = normalize
        if layers < 1:
            checks.fail("layers", "at least 1", layers)
        if not 0.0 <= dropout < 1.0:
            checks.fail("dropout", "a number in [0, 1)", dropout)
        self.detach = detach
        body: list[nn.Module] = []
        for _ in range(layers - 1):
            body += [nn.Linear(hidden_size, hidden_size), nn.GELU()]
            body += [nn.LayerNorm(hidden_size)] if layer_norm else []
            body += [nn.Dropout(dropout)] if dropout > 0 else []
        self.body = nn.Sequential(*body)
        self.out = nn.Linear(hidden_size, 1)
        self.reset_parameters()

    @classmethod
    def as_released(cls, hidden_size: int, **settings: Any) -> LogPartition:
        """The authors' block: LayerNorm and dropout 0.1. (They also leave out the last prompt token: mask it.)"""
        return cls(hidden_size, layer_norm=True, dropout=0.1, **settings)

    def reset_parameters(self) -> None:
        for module in self.body:
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    @classmethod
    def load(cls, folder: str | Path) -> LogPartition:
        """The log Z that a model folder of the trainer or of the TRL plug-in brings along, in its file `LOG_Z_FILE`.

        The file is a safetensors file under a name that no server takes for weights of the language model. Raises
        FileNotFoundError where the folder has none. Dropout and `detach`, which have no weights, are off.
        """
        from safetensors.torch import load

        state = load((Path(folder) / LOG_Z_FILE).read_bytes())
        dense = [name for name, tensor in state.items() if name.startswith("body.") and tensor.dim() == 2]
        normed = any(name.startswith("body.") and name.endswith("weight") and state[name].dim() == 1 for name in state)
        module = cls(state["out.weight"].shape[1], layers=len(dense) + 1, layer_norm=normed)
        # dropout shifts the places of the layers, not their order
        ours = list(module.state_dict())
        theirs = sorted(state, key=_by_place)
        module.load_state_dict({name: state[other] for name, other in zip(sorted(ours, key=_by_place), theirs)})
        return module

    def save(self, folder: str | Path, state: dict[str, Tensor] | None = None) -> None:
        """Writes `LOG_Z_FILE` into a folder; `state` in place of the module's own where that is sharded."""
        from safetensors.torch import save

        state = {name: tensor.detach().contiguous() for name, tensor in (state or self.state_dict()).items()}
        (Path(folder) / LOG_Z_FILE).write_bytes(save(state, {"format": "pt", "module": "LogPartition"}))

    def forward(
        self, hidden: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, cp_group: Any = None
    ) -> Tensor:
        """log Z per prompt, fp32. [B]

        Args:
            hidden: [B, P, H] with `mask` [B, P] (True at prompt tokens), or packed [N, H] with `cu_seqlens` [B+1].
                A prompt without tokens pools to zeros.
            cp_group: a ProcessGroup over whose ranks each prompt's tokens are split, for a loss with the same cp_group:
                every rank gets the whole log Z, and its share of the gradient. (Without dropout, or the same on each.)
        """
        checks.floating("hidden", hidden)
        width = (self.body[0] if len(self.body) else self.out).in_features
        if hidden.shape[-1] != width:
            checks.fail("hidden", f"hidden size {width} in the last dimension", checks.shape(hidden))
        if self.detach:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = prompt_mean(hidden, mask, cu_seqlens, cp_group)  # [B, H] fp32
            if self.normalize:
                pooled = pooled * (pooled.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            x = self.body(pooled.to(self.out.weight.dtype))
            out = torch.nn.functional.linear(x.float(), self.out.weight.float(), self.out.bias.float())
            return out.sum(-1)  # [B, 1] -> [B]; not a view, which FSDP's hooks warn about


def prompt_mean(hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cp_group: Any = None) -> Tensor:
    """Mean hidden state over each prompt's tokens, in fp32. [B, H]"""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if hidden.dim() != (3 if cu_seqlens is None else 2) or (cu_seqlens is None and mask is None):
        got = checks.shape(hidden) + ("" if mask is None else f" and mask {checks.shape(mask)}")
        checks.fail("hidden", "[B, P, H] with mask [B, P], or [N, H] with cu_seqlens", got)
    segments = segments_of(hidden[..., 0], mask, cu_seqlens, "hidden")
    value = hidden.to(dtype).masked_fill(~segments.mask[..., None], 0.0)
    if cu_seqlens is None:
        total = value.sum(1)
    else:
        total = torch.segment_reduce(value, "sum", offsets=segments.cu_seqlens, axis=0, initial=0.0, unsafe=True)
    count = segments.total(torch.ones_like(segments.mask, dtype=dtype))
    if cp_group is not None:
        from flowrl_kernels.ops.context_parallel import SumOverRanks

        checks.process_group("cp_group", cp_group)
        both = torch.cat((total.double(), count[:, None]), 1)  # [B, H + 1], one collective
        total, count = SumOverRanks.apply(both, cp_group, True).split((total.shape[1], 1), 1)
    return (total / count.reshape(-1, 1).clamp_min(1.0)).to(dtype)
