"""Tokens a second of each rollout engine: python -m benchmarks.rollout_engines FOLDER [--server FILE.toml] (minutes).

FOLDER holds a Hugging Face model. It runs in vLLM's environment (`make test-vllm` makes it). Every engine gives 4
prompts x 8 responses of 64 tokens; the engines' figures hold a push of all weights, and the sampled tokens'
log-probabilities from seeds of their own. `vllm` is vLLM's own `LLM.generate` with neither.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable

import torch

from flowrl_kernels.trainer.config import Config, ModelConfig, ParallelConfig, RolloutConfig, RunConfig
from flowrl_kernels.trainer.parallel import ALONE
from flowrl_kernels.trainer.policy import Policy, load_model
from flowrl_kernels.trainer.rollout import Sampling
from flowrl_kernels.trainer.rollout.base import Engine
from flowrl_kernels.trainer.rollout.hf import HFEngine

PROMPTS, SAMPLES, TOKENS = 4, 8, 64


def timed(run: Callable[[int], int]) -> float:
    """Tokens a second of run(tokens a response) -> tokens in all; a short one first."""
    run(4)
    start = time.perf_counter()
    return run(TOKENS) / (time.perf_counter() - start)


def of_engine(engine: Engine, model: torch.nn.Module, prompts: list[list[int]]) -> float:
    """With a push before, as in a step."""

    def run(tokens: int) -> int:
        engine.update_weights(model.state_dict().items(), tokens)
        return int(engine.generate(prompts, SAMPLES, Sampling(tokens), seed=1).length.sum())

    return timed(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--server", metavar="ADDRESS", help="a server that `make serve` started for the same model")
    parser.add_argument("--only", nargs="*", default=["transformers", "hf", "server", "engine", "vllm"])
    given = parser.parse_args()
    config = Config(
        run=RunConfig(dir="runs/engines"),
        model=ModelConfig(name=given.folder),
        rollout=RolloutConfig(engine="vllm", prompts=PROMPTS, samples=SAMPLES, kv_cache=1.0),
        parallel=ParallelConfig(dtype=given.dtype),
    )
    torch.set_num_threads(given.threads)
    model = load_model(given.folder, config.model, None).to(getattr(torch, given.dtype)).eval()
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    prompts = [torch.randint(100, vocab, (16 + 4 * i,), generator=generator).tolist() for i in range(PROMPTS)]
    figures = {}
    if "transformers" in given.only:
        ids = torch.tensor([prompt[:16] for prompt in prompts])

        def plain(tokens: int) -> int:
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=SAMPLES,
                    max_new_tokens=tokens, min_new_tokens=tokens, top_k=0,
                )  # fmt: skip
            return out[:, 16:].numel()

        figures["transformers generate"] = timed(plain)
    if "hf" in given.only:
        figures["hf"] = of_engine(HFEngine(Policy(model), batch=1024, device=ALONE.device), model, prompts)
    if given.server and "server" in given.only:
        from flowrl_kernels.trainer.rollout.server import ServerEngine

        asked = dataclasses.replace(config.rollout, engine="server", servers=(given.server,))
        server = ServerEngine(dataclasses.replace(config, rollout=asked), vocab, ALONE)
        figures["server"] = of_engine(server, model, prompts)
        server.close()
    if {"engine", "vllm"} & set(given.only):
        from vllm import SamplingParams

        from flowrl_kernels.trainer.rollout.vllm import VLLMEngine

        engine = VLLMEngine(config, model, ALONE)
        figures["vllm, as an engine"] = of_engine(engine, model, prompts)

        def bare(tokens: int) -> int:
            sampling = SamplingParams(n=SAMPLES, max_tokens=tokens, ignore_eos=True, detokenize=False)
            out = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
            return sum(len(choice.token_ids) for request in out for choice in request.outputs)

        figures["vllm, bare"] = timed(bare)
        engine.close()
    for name, rate in figures.items():
        print(f"{name:24s} {rate:7.1f} tokens/s  ({given.dtype}, {given.threads} threads)")


if __name__ == "__main__":
    main()
