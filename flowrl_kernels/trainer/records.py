"""What the parts of a run hand each other; plain data, below everything that works on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowrl_kernels.core.types import LossOutput
from flowrl_kernels.trainer.batches import MicroBatch, pack
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.log import Log
from flowrl_kernels.trainer.objective import Loss
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.policy import Policy, Scored, named_weights
from flowrl_kernels.trainer.prompts import Mixture
from flowrl_kernels.trainer.reward import Scorer
from flowrl_kernels.trainer.rollout import Engine, Generated, Kept, Sampling
from flowrl_kernels.trainer.rollout.faults import EngineError
from flowrl_kernels.trainer.tasks import Problem, Task
from flowrl_kernels.trainer.token_order import TokenOrder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Progress:
    """What a checkpoint says about the loop; the position in the data follows from `step`."""

    step: int = 0
    updates: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    evaluated: int = -1  # the last step whose evaluation, where it has one, is done


@dataclass
class Text:
    """The task and its way into tokens and back."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    encode: Callable[[Problem], list[int]]
    decode: Callable[[list[list[int]]], list[str]]


@dataclass(frozen=True)
class Job:
    """What a model of this run is made under."""

    config: Config
    world: World
    text: Text
    attention: str | None  # of transformers


@dataclass(frozen=True)
class Prompts:
    """What this rank has sampled for a step."""

    step: int
    problems: list[Problem]
    numbers: list[int]  # of each among all ranks' of the step
    tokens: list[list[int]]
    seed: int


@dataclass
class Ahead:
    """A batch that is sampled while the one before it trains (overlap.py)."""

    step: int  # that will train on it
    version: int  # updates that the weights it is sampled from have seen
    numbers: list[int]
    wait: Callable[[], Generated] | None = None  # gives it; None once that was called
    out: Generated | None = None
    error: EngineError | None = None


@dataclass
class Run:
    """What a step needs; made once by `run.prepare`."""

    config: Config
    world: World
    folder: Path
    text: Text
    problems: list[Problem]  # the train split, without prompts that are too long
    policy: Policy
    reference: Scored | None
    engine: Engine
    sampling: Sampling
    optimizer: torch.optim.Optimizer
    scorer: Scorer
    log: Log
    loss: Loss
    mixture: Mixture | None  # how several training files are mixed
    inputs: dict[str, str]  # hashes of the data, the task's code and the model
    saved: dict[str, Any] | None  # what the checkpoint says that this run was resumed from
    token_order: TokenOrder | None = None  # with `parallel.share`
    pushed: int = -1  # updates that the weights given to the engine last have seen
    probe_gap: float = 0.0  # between the engine's log-probabilities and the trainer's, nats, after that push
    ahead: Ahead | None = None  # the next step's batch, with `rollout.overlap`
    staleness: int = 0  # updates between the weights that sampled this step's batch and those it began to train at
    start: Policy | None = None  # what RL started from, once an evaluation asked for it; `reference` where there is one
    start_logp: dict[str, Tensor] = field(default_factory=dict)  # of each problem's listed responses under it

    @property
    def task(self) -> Task:
        return self.text.task

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def total_updates(self) -> int:
        return self.config.run.steps * self.config.updates_a_step

    def engine_figures(self) -> dict[str, float]:
        """What a step's line says of an engine that has weights of its own."""
        figures: dict[str, float] = {} if self.config.rollout.engine == "hf" else {"probe_gap": self.probe_gap}
        return figures | ({"staleness": self.staleness} if self.config.rollout.overlap else {})

    def packed(
        self,
        keep: Sequence[int],
        prompts: list[np.ndarray],
        responses: list[np.ndarray],
        policy: Scored,
        together: int = 1,
    ) -> list[MicroBatch]:
        """`batches.pack` by the run's budgets, laid out as the policy wants it."""
        p = self.config.parallel
        return pack(
            list(keep), prompts, responses, max_tokens=p.max_tokens, row_tokens=p.row_tokens, device=self.world.device,
            together=together, alone=policy.packing == "alone", share=policy.shares,
        )  # fmt: skip

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        return named_weights(self.policy)


@dataclass
class Rollouts:
    """This rank's responses of one step, those of a prompt next to each other."""

    problems: list[Problem]  # per sequence
    numbers: list[int]  # per sequence, its number among those of all ranks
    prompts: list[np.ndarray]
    responses: list[np.ndarray]
    logp: Tensor  # [B, T] fp32 as sampled
    finished: Tensor  # [B] bool
    texts: list[str]
    kept: Kept | None = None  # what each token was drawn from; None: everything
    reward: list[float | None] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)  # of several rewards, each by its name
    order: Tensor | None = None  # [V] int64, the vocabulary as a sampled backward cuts it in this step


@dataclass
class Shaped:
    """Per local sequence: whether it takes part, and named values."""

    keep: list[bool]
    values: dict[str, Tensor]  # [B] each


@dataclass
class Update:
    """The micro-batches of one optimiser step on this rank, and what all ranks hold together."""

    batches: list[MicroBatch]
    tokens: int
    sequences: int


@dataclass
class Result:
    """One optimiser step as every rank saw it; tensors stay on the device until the step is logged."""

    outputs: list[tuple[LossOutput, MicroBatch]]  # per micro-batch
    loss: float
    grad_norm: float
    lr: float
    skipped: bool


class Lap:
    """Seconds by phase: `lap("name")` ends one, or a part of one."""

    def __init__(self) -> None:
        self.start = self.last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name], self.last = self.seconds.get(name, 0.0) + now - self.last, now
