"""The parts that training and evaluation are put together from: model, tokens, engine, optimiser."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from flowrl_kernels.trainer import parallel, policy
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.records import Run, Text
from flowrl_kernels.trainer.rollout import Engine
from flowrl_kernels.trainer.rollout.hf import HFEngine
from flowrl_kernels.trainer.rollout.stops import Stops
from flowrl_kernels.trainer.tasks import Problem, Task, char_tokenizer, check_characters

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def open_model(source: str, config: Config, world: World, attention: str | None) -> torch.nn.Module:
    """The model, with weights where this rank needs them (rank 0, or every rank that does not shard)."""
    return policy.load_model(source, config.model, attention, empty=world.mesh is not None and not world.main)


def frozen_start(run: Run) -> policy.Scored:
    """The model RL started from; read once for an evaluation of a run that keeps no reference. Every rank calls it."""
    if run.reference is not None:
        return run.reference
    if run.policy.lora:
        return policy.Frozen(run.policy)
    if run.start is None:
        folder = run.folder / "start"
        source = str(folder) if parallel.first(folder.exists, run.world) else run.config.model.name
        attention = parallel.attention_of(run.config.model, run.config.parallel, run.world.device)
        model = open_model(source, run.config, run.world, attention)
        run.start = policy.make_policy(run.config, run.world, model, reference=True, packing=run.policy.packing)
    return run.start


def make_text(config: Config, task: Task, tokenizer: PreTrainedTokenizerBase | None = None) -> Text:
    """The task with its way into tokens and back.

    tokenizer: of a finished run; else the model's own, or the task's characters.
    """
    tokenizer = tokenizer or make_tokenizer(config, task)
    return Text(task, tokenizer, make_encoder(config, task, tokenizer), make_decoder(tokenizer))


def make_tokenizer(config: Config, task: Task) -> PreTrainedTokenizerBase:
    """The model's own tokenizer, or the task's characters for a model that is built here."""
    if config.model.name:
        return policy.load_tokenizer(config.model.name, config.model)
    if task.alphabet is None:
        raise ValueError(f"model.name: task {task.name!r} has no alphabet of its own; name a Hugging Face model")
    return char_tokenizer(task.alphabet)


def make_encoder(config: Config, task: Task, tokenizer: PreTrainedTokenizerBase) -> Callable[[Problem], list[int]]:
    """Problem -> prompt tokens; each problem is tokenized once.

    Raises:
        ValueError: chat messages, or `task.chat_template`, and a tokenizer without a chat template.
    """
    cache: dict[str, list[int]] = {}
    wrap = task.alphabet is None and config.task.chat_template

    def tokens(prompt: str | list[dict[str, str]]) -> list[int]:
        if isinstance(prompt, str) and not wrap:
            if task.alphabet is not None and not config.model.name:
                check_characters([prompt], task.alphabet, "prompt")
            return tokenizer(prompt, add_special_tokens=task.alphabet is None)["input_ids"]
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if config.task.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": config.task.system})
        if not tokenizer.chat_template:
            raise ValueError(
                f"task.chat_template: the tokenizer of {config.model.name!r} has no chat template; set it to false"
            )
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # jinja2's, raised by the template itself
            raise refusal(error, config) from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(problem: Problem) -> list[int]:
        key = problem.prompt if isinstance(problem.prompt, str) else repr(problem.prompt)
        if key not in cache:
            cache[key] = tokens(problem.prompt)
            if not cache[key]:
                raise ValueError(f"task: the prompt of problem {problem.id} has no tokens")
        return cache[key]

    return encode


def refusal(error: Exception, config: Config) -> ValueError:
    """What a chat template's own refusal means to the user."""
    key = "task.system" if config.task.system else "task.chat_template"
    return ValueError(f"{key}: the chat template of {config.model.name!r} refuses these messages: {error}")


def make_decoder(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[list[int]]], list[str]]:
    """Token ids -> texts without special tokens; ids past the tokenizer's (a padded vocabulary) become U+FFFD."""
    known = len(tokenizer)
    if getattr(tokenizer, "is_fast", False):
        fast = tokenizer.backend_tokenizer
        plain = partial(fast.decode_batch, skip_special_tokens=True)
    else:
        plain = partial(tokenizer.batch_decode, skip_special_tokens=True)

    def decode(rows: list[list[int]]) -> list[str]:
        texts = plain([[token for token in row if token < known] for row in rows])
        for i, row in enumerate(rows):
            if row and max(row) >= known:
                parts = [list(part) for _, part in itertools.groupby(row, lambda token: token >= known)]
                texts[i] = "".join("\ufffd" * len(part) if part[0] >= known else plain([part])[0] for part in parts)
        return texts

    return decode


def stop_tokens(actor: Policy, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Tokens that end a response: the tokenizer's end and those the model names."""
    generation = getattr(actor.model, "generation_config", None)
    named = getattr(generation, "eos_token_id", None) or []
    return tuple(sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])}))


def make_stops(config: Config, text: Text) -> Stops | None:
    """The texts that end a response, if there are any. Raises ValueError for one that never could."""
    return Stops(config.rollout.stop, text.decode, text.tokenizer) if config.rollout.stop else None


def make_engine(config: Config, actor: Policy, world: World) -> Engine:
    """The rollout engine named in the config.

    Raises:
        EngineError: it cannot be started or reached.
    """
    if config.rollout.engine == "vllm":
        from flowrl_kernels.trainer.rollout.vllm import VLLMEngine

        return VLLMEngine(config, actor.model, world)
    if config.rollout.engine == "server":
        from flowrl_kernels.trainer.rollout.server import ServerEngine

        return ServerEngine(config, actor.model.config.get_text_config().vocab_size, world)
    return HFEngine(actor, batch=config.rollout.batch, device=world.device)


def make_optimizer(config: Config, actor: Policy) -> torch.optim.Optimizer:
    groups = [{**group, "base_lr": group["lr"]} for group in actor.groups(config)]
    o = config.optim
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True)
