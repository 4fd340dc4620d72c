"""Responses as serving engines give them, looked at before anything trusts them, and made one batch of."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from flowrl_kernels.trainer.rollout.base import Generated, Sampling
from flowrl_kernels.trainer.rollout.faults import Fault


class Response(NamedTuple):
    tokens: list[int]  # the end token included
    logp: list[float]  # of each, under the distribution it was drawn from
    versions: list[str]  # labels of the weights it was sampled from


def draw_seed(seed: int, number: int) -> int:
    """The seed of prompt `number`'s responses; response j takes this and j. Prompts lie far apart, whoever asks."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:6], "big")


def look_at(response: Response, sampling: Sampling, vocab: int, label: str) -> None:
    """Refuses a response that is not what was asked for.

    Args:
        vocab: number of token ids.
        label: of the weights that were pushed last.

    Raises:
        Fault: saying what is wrong with it.
    """
    tokens, logp, versions = response
    if set(versions) != {label}:
        raise Fault(f"a response of weights {', '.join(map(repr, versions)) or 'unnamed'} came, {label!r} were pushed")
    if len(tokens) != len(logp):
        raise Fault(f"{len(tokens)} tokens came with {len(logp)} log-probabilities")
    if not all(type(token) is int and 0 <= token < vocab for token in tokens):
        raise Fault(f"token ids outside 0 to {vocab - 1} came")
    if not all(type(x) in (int, float) and (x <= 1e-4 or math.isnan(x)) for x in logp):
        raise Fault("log-probabilities that are no numbers below 0 came")
    if len(tokens) > sampling.max_new_tokens:
        raise Fault(f"{len(tokens)} tokens came, at most {sampling.max_new_tokens} were asked for")
    last = set(sampling.ends)
    ends = [i for i, token in enumerate(tokens) if token in last]
    if ends and ends[0] < len(tokens) - 1:
        raise Fault(f"a response goes on after its end token at {ends[0]}")
    if not ends and len(tokens) < sampling.max_new_tokens:
        raise Fault(f"a short response came: {len(tokens)} of {sampling.max_new_tokens} tokens and no end token")


def together(responses: Sequence[Response], sampling: Sampling, version: int) -> Generated:
    """One batch of all responses, those of a prompt next to each other, each up to its end.

    An engine that ends by token ids alone samples on behind a stop text of several tokens: that is cut off here.
    """
    if sampling.stops is not None:
        to = [sampling.stops.length(response.tokens) for response in responses]
        responses = [r._replace(tokens=r.tokens[:n], logp=r.logp[:n]) for r, n in zip(responses, to)]
    else:
        to = [None] * len(responses)
    width = max(len(response.tokens) for response in responses)
    tokens = torch.zeros(len(responses), width, dtype=torch.int64)
    logp = torch.zeros(len(responses), width)
    for row, response in enumerate(responses):
        n = len(response.tokens)
        tokens[row, :n] = torch.tensor(response.tokens)
        if sampling.temperature > 0.0:  # greedy: probability 1
            logp[row, :n] = torch.tensor(response.logp)
    length = torch.tensor([len(response.tokens) for response in responses])
    last = set(sampling.ends)
    finished = torch.tensor([n is not None or response.tokens[-1] in last for response, n in zip(responses, to)])
    return Generated(tokens, logp, length, finished, None, version)


def vllm_sampling(sampling: Sampling, n: int, seed: int) -> dict[str, object]:
    """The same as arguments of vLLM's `SamplingParams`; nothing is left to a server's defaults."""
    return {
        "n": n, "seed": seed, "max_tokens": sampling.max_new_tokens, "min_tokens": 0,
        "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k, "min_p": sampling.min_p,
        "presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0,
        "stop_token_ids": list(sampling.ends), "ignore_eos": True,  # the end tokens are ours to name
        "logprobs": 0, "detokenize": False,
    }  # fmt: skip
