"""A whole optimiser step with and without our head: forward, loss, backward, AdamW, on a random-weight model.

Where TRL is installed, its fused head takes part too, as it is and after `patch_logprobs`.

The model has Qwen2.5-0.5B's shape on a GPU. On a CPU it is a scaled-down variant (fewer and narrower layers, smaller
vocabulary), marked as such in the JSON and the table: its tokens/s say nothing about the full model.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

from benchmarks import machine, measure
from benchmarks.report import end_to_end_section
from benchmarks.run import MALLOC, ROOT

# Qwen2.5-0.5B: https://huggingface.co/Qwen/Qwen2.5-0.5B/blob/main/config.json
FULL = {
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    "intermediate_size": 4864, "vocab_size": 151936,
}  # fmt: skip
SMALL = {
    "hidden_size": 224, "num_hidden_layers": 4, "num_attention_heads": 7, "num_key_value_heads": 1,
    "intermediate_size": 1216, "vocab_size": 37984,
}  # fmt: skip
TOKENS = {"cuda": (8, 2048), "cpu": (4, 256)}  # sequences, tokens of each; eager takes 70 GB at 16384 tokens
HEADS = ("eager", "ours", "trl", "trl-patched")  # TRL's own fused head, and the same trainer's after patch_logprobs


def model(device: str, seed: int) -> torch.nn.Module:
    """The random-weight model, tied embeddings; bf16 on a GPU, fp32 on a CPU."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    shape = FULL if device == "cuda" else SMALL
    config = Qwen2Config(**shape, tie_word_embeddings=True, max_position_embeddings=8192, use_cache=False)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    return Qwen2ForCausalLM(config).to(device=device, dtype=dtype)


def logp_eager(network: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """All logits, fp32 log-softmax (float64 for a float64 model): the usual trainer. [B, T - 1]"""
    logits = network(input_ids=ids).logits[:, :-1]
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits, dim=-1).gather(2, ids[:, 1:, None])[..., 0]


def logp_ours(network: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Hidden states into linear_logprob. [B, T - 1]"""
    from flowrl_kernels.logprobs import linear_logprob

    hidden = network.model(input_ids=ids).last_hidden_state[:, :-1]
    return linear_logprob(hidden, network.lm_head.weight, ids[:, 1:]).logp


def logp_trl(network: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """TRL's forward with its fused head, as its trainers call it. [B, T - 1]"""
    return network(input_ids=ids, labels=ids, fused_lm_head=True).log_probs


def add_trl(network: torch.nn.Module, patched: bool) -> None:
    """TRL's fused head on the model; and `patch_logprobs` on what has the two attributes of a trainer that it reads."""
    from trl.trainer.utils import add_fused_lm_head

    add_fused_lm_head(network)
    if patched:
        from flowrl_kernels.integrations.trl import patch_logprobs

        patch_logprobs(SimpleNamespace(model=network, accelerator=SimpleNamespace(unwrap_model=lambda model: model)))


def usable() -> list[str]:
    """The heads that can be run here."""
    return [head for head in HEADS if not head.startswith("trl") or importlib.util.find_spec("trl")]


@torch.no_grad()
def exact(device: str, seed: int) -> torch.Tensor:
    """Log-probs in float64, a sequence at a time. [B, T - 1]"""
    network, ids = model(device, seed).double(), batch(device, seed)[0]
    return torch.cat([logp_eager(network, row[None]) for row in ids])


def loss_of(logp: torch.Tensor, reward: torch.Tensor) -> torch.Tensor:
    """FlowRL's squared residual on the first minibatch (w = 1) against a reference of 0; log Z = 0. docs/maths.md"""
    return (logp.mean(1) - 15.0 * reward).square().mean()


def prepare(head: str, device: str, seed: int):
    """(step, tokens per step): step() does one whole optimiser step and returns the loss."""
    network = model(device, seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-6, fused=device == "cuda")
    ids, reward = batch(device, seed)
    if head.startswith("trl"):
        add_trl(network, patched=head == "trl-patched")
    logp = {"eager": logp_eager, "ours": logp_ours}.get(head, logp_trl)

    def step(errors: list | None = None, truth: torch.Tensor | None = None) -> torch.Tensor:
        values = logp(network, ids)
        if truth is not None:
            errors.append(float((values.detach().double() - truth).abs().max()))
        loss = loss_of(values, reward)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step, ids.numel()


def batch(device: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids [B, T], reward [B])"""
    b, t = TOKENS[device]
    generator = torch.Generator().manual_seed(seed)
    vocab_size = (FULL if device == "cuda" else SMALL)["vocab_size"]
    ids = torch.randint(0, vocab_size, (b, t), generator=generator).to(device)
    return ids, torch.randn(b, generator=generator).to(device)


def memory_of(head: str, device: str, seed: int) -> dict:
    """Peak of the second step (the optimiser's state is there by then) beyond weights and state."""
    step, _ = prepare(head, device, seed)
    step()
    peak = measure.cuda_peak if device == "cuda" else measure.cpu_peak
    return peak(step, lambda made: 0)


def run(device: str, repeats: int, seed: int, threads: int | None) -> dict:
    """Time the heads in turns, then memory each in a fresh process; their losses must agree."""
    if threads:
        torch.set_num_threads(threads)
    steps, errors = {}, {}
    heads, truth = usable(), exact(device, seed)
    for head in heads:
        steps[head], tokens = prepare(head, device, seed)
        errors[head] = []
    losses = {head: float(step(errors[head], truth)) for head, step in steps.items()}
    before = machine.load()
    times = measure.take_turns(steps, measure.Clock(device), repeats)
    steps.clear()
    gc.collect()  # models are cycles, and the fresh processes need their memory
    if device == "cuda":
        torch.cuda.empty_cache()
    gap = max(abs(loss - losses["eager"]) for loss in losses.values()) / abs(losses["eager"])
    limit = 1e-4 if device == "cpu" else 2e-2  # bf16 logits in the eager head
    document = {
        "schema": 1,
        "kind": "end-to-end",
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(device),
        "versions": machine.versions(),
        **machine.commit(),
        "seed": seed,
        "model": FULL if device == "cuda" else SMALL,
        "scaled_down": device != "cuda",
        "sequences_tokens": TOKENS[device],
        "tokens": tokens,
        "loss_gap": gap,
        "status": "ok" if gap <= limit else f"failed: losses differ by {gap:.3g} > {limit:g}",
        "heads": {},
        "load": {"before": before, "after": machine.load()},
    }
    for head in heads:
        entry = {"step": times[head], "memory": _fresh(head, device, seed, threads), "logp_error": errors[head][0]}
        entry["tokens_per_s"] = tokens / times[head]["median_s"]
        document["heads"][head] = entry
    return document


def _fresh(head: str, device: str, seed: int, threads: int | None) -> dict:
    command = [sys.executable, "-m", "benchmarks", "end-to-end", "--memory-of", head, "--device", device]
    command += ["--seed", str(seed), *(["--threads", str(threads)] if threads else [])]
    made = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, env={**os.environ, **MALLOC})
    if made.returncode != 0:
        return {"error": (made.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    return json.loads(made.stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks end-to-end", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "benchmarks")
    parser.add_argument("--tag", default=None)
    parser.add_argument("--memory-of", choices=HEADS, default=None, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    device = given.device if given.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if given.memory_of:
        if given.threads:
            torch.set_num_threads(given.threads)
        print(json.dumps(memory_of(given.memory_of, device, given.seed)))
        return 0
    document = run(device, given.repeats, given.seed, given.threads)
    given.out.mkdir(parents=True, exist_ok=True)
    name = given.tag or f"{document['started'][:10]}-end-to-end-{device}"
    (given.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    print(end_to_end_section(document, f"{name}.json"))
    return 0 if document["status"] == "ok" else 1
