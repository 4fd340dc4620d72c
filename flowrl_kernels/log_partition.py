"""The network that learns log Z."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowrl_kernels.core import checks
from flowrl_kernels.core.layout import segments_of

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LogPartition"]

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
        for name, value in (("hidden_size", hidden_size), ("layers", layers)):
            if checks.integer(name, value) < 1:
                checks.fail(name, "at least 1", value)
        for name, value in (("layer_norm", layer_norm), ("detach", detach), ("normalize", normalize)):
            checks.flag(name, value)
        self.normalize = normalize
        if not 0.0 <= checks.number("dropout", dropout) < 1.0:
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
        self,
        hidden: Tensor,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cp_group: ProcessGroup | None = None,
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
        if hidden.dim() < 2 or hidden.shape[-1] != width:
            checks.fail("hidden", f"[B, P, H] or [N, H] with a hidden size of {width}", checks.shape(hidden))
        if self.detach:
            hidden = hidden.detach()
        with torch.autocast(hidden.device.type, enabled=False):
            pooled = prompt_mean(hidden, mask, cu_seqlens, cp_group)  # [B, H] fp32
            if self.normalize:
                pooled = pooled * (pooled.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
            x = self.body(pooled.to(self.out.weight.dtype))
            out = torch.nn.functional.linear(x.float(), self.out.weight.float(), self.out.bias.float())
            return out.sum(-1)  # [B, 1] -> [B]; not a view, which FSDP's hooks warn about


def prompt_mean(
    hidden: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cp_group: ProcessGroup | None = None
) -> Tensor:
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
