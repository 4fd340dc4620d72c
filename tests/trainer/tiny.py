"""A tiny model and its configuration, shared by the trainer's tests."""

import dataclasses

import numpy as np
import torch

from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.parallel import World
from flowrl_kernels.trainer.tasks import char_tokenizer

ALPHABET = "0123456789+="
ALONE = World(0, 1, torch.device("cpu"), None)


def config(**sections) -> Config:
    """The default configuration with a 2-layer, 32-wide model; `section={field: value}` replaces fields."""
    small = {"hidden": 32, "layers": 2, "heads": 2, "ffn": 48, "context": 64, "init": 0.2}
    sections = {**sections, "model": {**small, **sections.get("model", {})}}
    base = Config()
    tables = {name: dataclasses.replace(getattr(base, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(base, **tables)


def model(cfg: Config | None = None):
    return policies.build_model(cfg or config(), char_tokenizer(ALPHABET), "sdpa")


def sequences(count=9, seed=0, longest=12):
    """Prompts and responses of ragged lengths, as int64 arrays."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(2, 14, rng.integers(1, 7)) for _ in range(count)]
    responses = [np.append(rng.integers(2, 14, rng.integers(0, longest)), 1) for _ in range(count)]
    return prompts, responses


def flags(text: str) -> list[str]:
    """Command-line arguments from `section.field value` pairs."""
    return [word if i % 2 else f"--{word}" for i, word in enumerate(text.split())]


# a run of seconds: no evaluation to speak of, no pictures
SMALL = flags("""
    model.hidden 32  model.layers 1  model.heads 2  model.ffn 48  model.context 16  model.init 0.2
    rollout.prompts 4  rollout.samples 4  rollout.max_new_tokens 6  run.threads 1
    eval.samples 2  eval.problems 4  eval.exact False  eval.start False
    checkpoint.export False  log.progress False  log.plots False
""")
