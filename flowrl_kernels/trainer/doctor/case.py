"""What an engine sampled, and how the trainer scores it, as it is and with a part swapped."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flowrl_kernels.hf.head import HeadScales
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.rollout.base import Engine, Kept, Sampling, kept_tokens

CELLS = 1 << 27  # numbers of one [N, V] table: responses beyond it are left out


@dataclass(frozen=True)
class Setting:
    """What the doctor is told besides the engine's output.

    history: names of earlier weights ("version 3, the push before"), newest first, and their tensors by name.
    prompts: names of other ways to write the same prompts ("without the chat template"), each with all of them.
    temperature: the trainer scores at; None: the sampling's.
    """

    history: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    prompts: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    temperature: float | None = None


@dataclass
class Case:
    """B responses with N tokens in all; the log-probs of both sides over the same tokens."""

    policy: Policy
    setting: Setting
    sampling: Sampling
    prompts: list[list[int]]  # B, as the trainer writes them
    responses: list[list[int]]
    finished: list[bool]
    engine: Tensor  # [N] float64: the engine's log-probs
    kept: Kept | None
    version: int
    which: list[int]  # B: the number of each one's prompt

    # ------------------------------------------------------------------------------------------ what is known of it

    @property
    def temperature(self) -> float:
        """What the trainer scores at."""
        return self.sampling.temperature if self.setting.temperature is None else self.setting.temperature

    @property
    def device(self) -> torch.device:
        return self.policy.head.weight.device

    @cached_property
    def target(self) -> Tensor:  # [N]
        return torch.tensor([token for row in self.responses for token in row], device=self.device)

    @cached_property
    def owner(self) -> Tensor:  # [N] the response of each token
        return torch.tensor([b for b, row in enumerate(self.responses) for _ in row], device=self.device)

    @cached_property
    def z(self) -> Tensor:
        """[N, V] fp32: the trainer's logits, before the temperature."""
        return self.logits(self.hidden())

    @cached_property
    def mask(self) -> Tensor | None:
        """[N, V] bool: what the tokens were drawn from by the declared sampling; None: everything."""
        if not self.sampling.truncated:
            return None
        if self.kept is None:
            keep = kept_tokens(self.z / self.temperature, self.sampling)
        else:
            keep = torch.zeros_like(self.z, dtype=torch.bool)
            rows = torch.arange(len(self.target), device=self.device).repeat_interleave(
                self.kept.offsets.diff().to(self.device)
            )
            keep[rows, self.kept.ids.long().to(self.device)] = True
        return keep.scatter(1, self.target[:, None], True)

    @cached_property
    def trainer(self) -> Tensor:
        """[N] float64: the trainer's log-probs, as they are."""
        return self.logp(self.z)

    @cached_property
    def gap(self) -> Tensor:
        return self.engine - self.trainer

    def seen(self, prompt: bool) -> Tensor:
        """[N, V] bool: tokens that came before, in the response and (where `prompt`) the prompt."""
        table = torch.zeros_like(self.z, dtype=torch.bool)
        at = 0
        for start, row in zip(self.prompts, self.responses):
            so_far = table.new_zeros(table.shape[1])
            if prompt:
                so_far[torch.tensor(start, device=self.device)] = True
            for token in row:
                table[at] = so_far
                so_far[token] = True
                at += 1
        return table

    # ------------------------------------------------------------------------------------------ scoring otherwise

    def logp(self, z: Tensor, temperature: float | None = None, mask: Tensor | str | None = "declared") -> Tensor:
        """[N] float64 log-probs of the sampled tokens from logits [N, V]."""
        z = z.float() / (self.temperature if temperature is None else temperature)
        keep = self.mask if isinstance(mask, str) else mask
        z = z if keep is None else z.masked_fill(~keep, -torch.inf)
        return torch.log_softmax(z, -1).gather(1, self.target[:, None])[:, 0].double()

    def hidden(
        self,
        model: Any = None,
        prompts: Sequence[Sequence[int]] | None = None,
        shift: tuple[int, int] = (0, 0),
    ) -> Tensor:
        """[N, H]: the final states that predict each token.

        shift: added to the positions of the prompt and of the response.
        """
        backbone = (self.policy.model if model is None else model).base_model
        prompts = self.prompts if prompts is None else prompts
        order = sorted(range(len(prompts)), key=lambda b: len(prompts[b]) + len(self.responses[b]))
        out: list[Tensor | None] = [None] * len(prompts)
        for first in range(0, len(order), 64):
            part = order[first : first + 64]
            rows = [[*prompts[b], *self.responses[b]][:-1] for b in part]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=self.device)
            count = torch.arange(width, device=self.device).expand(len(rows), -1)
            on = count < torch.tensor([len(row) for row in rows], device=self.device)[:, None]
            late = count >= torch.tensor([len(prompts[b]) for b in part], device=self.device)[:, None]
            positions = (count + torch.where(late, shift[1], shift[0])).clamp(min=0)
            # a mask, so that positions which jump do not read as several sequences
            states = backbone(
                input_ids=ids, position_ids=positions, attention_mask=on.long(), use_cache=False
            ).last_hidden_state
            for row, b in enumerate(part):
                start = len(prompts[b]) - 1
                out[b] = states[row, start : start + len(self.responses[b])]
        return torch.cat([states for states in out if states is not None])

    def logits(
        self, hidden: Tensor, weight: Tensor | None = None, scales: HeadScales | None = None, half: str = ""
    ) -> Tensor:
        """[N, V] fp32 of states [N, H].

        half: "inputs": states and weight rounded to bfloat16, "logits": the products too.
        """
        head, scales = self.policy.head, self.policy.scales if scales is None else scales
        weight = head.weight if weight is None else weight
        bias = getattr(head, "bias", None)
        if half:
            hidden, weight = hidden.bfloat16(), weight.bfloat16()
        if half == "logits":
            out = torch.nn.functional.linear(hidden, weight, None if bias is None else bias.bfloat16()).float()
        else:
            out = hidden.float() @ weight.float().t()
            out = out if bias is None else out + bias.float()
        out = out * scales.logit_scale
        return scales.softcap * torch.tanh(out / scales.softcap) if scales.softcap else out

    @contextlib.contextmanager
    def swapped(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """The model with other tensors in place of its own, by the names of its state."""
        own = {**dict(self.policy.model.named_parameters()), **dict(self.policy.model.named_buffers())}
        before = {name: own[name].data for name in tensors if name in own}
        try:
            for name in before:
                own[name].data = tensors[name].to(before[name])
            yield
        finally:
            for name, value in before.items():
                own[name].data = value

    @contextlib.contextmanager
    def layers_swapped(self, i: int, j: int) -> Iterator[None]:
        layers = self.layers
        assert layers is not None
        layers[i], layers[j] = layers[j], layers[i]
        try:
            yield
        finally:
            layers[i], layers[j] = layers[j], layers[i]

    @property
    def layers(self) -> Any:
        """The backbone's list of decoder layers, None where it has none by that name."""
        return getattr(self.policy.model.base_model, "layers", None)

    @property
    def tied(self) -> bool:
        return self.policy.head.weight is self.policy.model.get_input_embeddings().weight

    @cached_property
    def half_model(self) -> Any:
        """The model rounded to bfloat16, weights and arithmetic."""
        return copy.deepcopy(self.policy.model).bfloat16()


@torch.no_grad()
def collect(
    policy: Policy,
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    n: int = 8,
    seed: int = 0,
    setting: Setting | None = None,
) -> Case:
    """`n` responses of the engine to each prompt, as many of them as fit a table of logits."""
    out = engine.generate([list(prompt) for prompt in prompts], n, sampling, seed)
    lengths, width = out.length.tolist(), policy.head.weight.shape[0]
    rows: list[int] = []
    tokens = 0
    for b, length in enumerate(lengths):
        if length and (not rows or (tokens + length) * width <= CELLS):
            rows.append(b)
            tokens += length
    if not rows:
        raise ValueError("the engine returned no token at all")
    first = torch.tensor([0, *lengths]).cumsum(0)
    kept = None
    if out.kept is not None:
        kept = out.kept.rows(torch.cat([torch.arange(int(first[b]), int(first[b + 1])) for b in rows]))
    device = policy.head.weight.device
    return Case(
        policy=policy,
        setting=setting or Setting(),
        sampling=sampling,
        prompts=[list(prompts[b // n]) for b in rows],
        responses=[out.tokens[b, : lengths[b]].tolist() for b in rows],
        finished=[bool(out.finished[b]) for b in rows],
        engine=torch.cat([out.logp[b, : lengths[b]] for b in rows]).double().to(device),
        kept=kept,
        version=out.version,
        which=[b // n for b in rows],
    )
