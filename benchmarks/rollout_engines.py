"""What rollouts cost, by engine: tokens a second, and a step's time by phase (minutes).

    python -m benchmarks.rollout_engines rates FOLDER     # tokens a second, pushes of all weights included
    python -m benchmarks.rollout_engines steps FOLDER     # a GRPO step by phase; by a server also with overlap
    python -m benchmarks.rollout_engines plot             # docs/images/rollout-phases.png from the committed numbers

FOLDER holds a Hugging Face model. It runs in vLLM's environment (`make test-vllm` makes it) and adds its numbers to
rollout_engines.json beside it. In `rates` every engine gives 4 prompts x 8 responses of 64 tokens with the sampled
tokens' log-probabilities; `vllm, bare` is vLLM's own `LLM.generate` without them, pushes or seeds. The gap is between
those log-probabilities and the trainer's on the same tokens, nats.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine
from flowrl_kernels import linear_logprob
from flowrl_kernels.trainer.config import Config, ModelConfig, ParallelConfig, RolloutConfig, RunConfig
from flowrl_kernels.trainer.parallel import ALONE
from flowrl_kernels.trainer.policy import Policy, load_model
from flowrl_kernels.trainer.rollout import Generated, Sampling
from flowrl_kernels.trainer.rollout.base import Engine
from flowrl_kernels.trainer.rollout.hf import HFEngine

OUT = Path(__file__).with_suffix(".json")
PICTURE = OUT.parent.parent / "docs/images/rollout-phases.png"
PROMPTS, SAMPLES, TOKENS = 4, 8, 64
PHASES = ("rollout", "reward", "score", "update", "push")
RUN = """
[run]
steps = {steps}
threads = {threads}
[task]
name = "countdown"
[model]
name = "{model}"
[rollout]
prompts = {prompts}
samples = {samples}
max_new_tokens = {tokens}
[algorithm]
name = "grpo"
entropy = 0.01  # countdown is too hard for it: something has to move the weights
[optim]
lr = 1e-6
[eval]
start = false
problems = 1
samples = 1
exact = false
[checkpoint]
export = false
[log]
progress = false
plots = false
"""


# ------------------------------------------------------------------------------------------------ tokens a second


def timed(run: Callable[[int], int], repeats: int) -> dict[str, list[float]]:
    """Tokens of run(tokens a response) -> tokens in all by the clock's and the processor's second; a short one first.

    The processor's seconds are this process's and its children's (a server's): with one thread each what one core
    would give if nobody else wanted it.
    """
    run(4)
    clock, processor = [], []
    for _ in range(repeats):
        start, busy = time.perf_counter(), worked()
        tokens = run(TOKENS)
        clock.append(tokens / (time.perf_counter() - start))
        processor.append(tokens / (worked() - busy))
    return {"tokens_per_s": clock, "tokens_per_cpu_s": processor}


def worked() -> float:
    """Seconds of processor of this process and everything it started that still runs."""
    import psutil

    own = psutil.Process()
    times = [process.cpu_times() for process in (own, *own.children(recursive=True))]
    return sum(each.user + each.system for each in times)


def of_engine(engine: Engine, model: Any, prompts: list[list[int]], repeats: int) -> dict[str, Any]:
    """With a push before each, as in a step; how long that takes, and how far the log-probs are from the trainer's."""
    pushes: list[float] = []
    gaps: list[float] = []

    def run(tokens: int) -> int:
        start = time.perf_counter()
        engine.update_weights(model.state_dict().items(), tokens)
        pushes.append(time.perf_counter() - start)
        out = engine.generate(prompts, SAMPLES, Sampling(tokens), seed=1)
        if tokens < TOKENS:  # the short one, which is not timed
            gaps.extend(gap(model, prompts, out))
        return int(out.length.sum())

    measured = timed(run, repeats) | {"push_s": pushes[1:]}
    return measured | {"gap_rms": statistics.mean(g * g for g in gaps) ** 0.5, "gap_max": max(map(abs, gaps))}


@torch.no_grad()
def gap(model: Any, prompts: list[list[int]], out: Generated) -> list[float]:
    """Engine minus trainer of each sampled token, nats."""
    gaps: list[float] = []
    for row, (tokens, logp, n) in enumerate(zip(out.tokens, out.logp, out.length.tolist())):
        prompt = prompts[row // SAMPLES]
        ids = torch.tensor([prompt + tokens[: n - 1].tolist()])
        hidden = model.base_model(ids).last_hidden_state[0, len(prompt) - 1 :]
        own = linear_logprob(hidden, model.get_output_embeddings().weight, tokens[:n]).logp
        gaps += (logp[:n] - own).tolist()
    return gaps


def rates(given: argparse.Namespace) -> dict[str, Any]:
    """Tokens a second of each engine, and of transformers and vLLM by themselves."""
    config = Config(
        run=RunConfig(dir=tempfile.mkdtemp(prefix="flowrl-engines-")),
        model=ModelConfig(name=given.folder),
        rollout=RolloutConfig(engine="vllm", prompts=PROMPTS, samples=SAMPLES, kv_cache=1.0),
        parallel=ParallelConfig(dtype=given.dtype),
    )
    model = load_model(given.folder, config.model, None).to(getattr(torch, given.dtype)).eval()
    generator = torch.Generator().manual_seed(0)
    vocab = model.config.vocab_size
    prompts = [torch.randint(100, vocab, (16 + 4 * i,), generator=generator).tolist() for i in range(PROMPTS)]
    figures: dict[str, Any] = {}
    if "transformers" in given.only:
        ids = torch.tensor([prompt[:16] for prompt in prompts])

        def plain(tokens: int) -> int:
            with torch.no_grad():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=SAMPLES,
                    max_new_tokens=tokens, min_new_tokens=tokens, top_k=0,
                )  # fmt: skip
            return out[:, 16:].numel()

        figures["transformers generate"] = timed(plain, given.repeats)
    if "hf" in given.only:
        live = HFEngine(Policy(model), batch=1024, device=ALONE.device)
        figures["hf"] = of_engine(live, model, prompts, given.repeats)
    if "server" in given.only:
        from flowrl_kernels.trainer.rollout.server import ServerEngine

        with served(given, {"prompts": PROMPTS, "samples": SAMPLES, "tokens": TOKENS}) as address:
            asked = dataclasses.replace(config.rollout, engine="server", servers=(address,))
            server = ServerEngine(dataclasses.replace(config, rollout=asked), vocab, ALONE)
            figures["server"] = of_engine(server, model, prompts, given.repeats)
            server.close()
    if {"vllm", "bare"} & set(given.only):
        from vllm import SamplingParams

        from flowrl_kernels.trainer.rollout.vllm import VLLMEngine

        engine = VLLMEngine(config, model, ALONE)
        figures["vllm"] = of_engine(engine, model, prompts, given.repeats)

        def bare(tokens: int) -> int:
            sampling = SamplingParams(n=SAMPLES, max_tokens=tokens, ignore_eos=True, detokenize=False)
            out = engine.llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
            return sum(len(choice.token_ids) for request in out for choice in request.outputs)

        figures["vllm, bare"] = timed(bare, given.repeats)
        engine.llm.collective_rpc("flowrl_head", args=("auto",))
        figures["vllm, the trainer's head"] = of_engine(engine, model, prompts, given.repeats)
        engine.close()
    shutil.rmtree(config.run.dir, ignore_errors=True)
    for name, made in figures.items():
        clock, processor = (statistics.median(made[key]) for key in ("tokens_per_s", "tokens_per_cpu_s"))
        more = {key: value for key, value in made.items() if not key.startswith("tokens")}
        print(f"{name:24s} {clock:7.1f} tokens/s, {processor:7.1f} tokens/cpu-s", more)
    return figures


@contextlib.contextmanager
def served(given: argparse.Namespace, sizes: dict[str, int]) -> Iterator[str]:
    """Address of a server for the model; it decodes as many sequences at once as a step of these sizes has."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        file.write_text(RUN.format(model=given.folder, threads=given.threads, steps=1, **sizes))
        line = [sys.executable, "-m", "flowrl_kernels.trainer.rollout.serve", str(file), "--port", str(port)]
        process = subprocess.Popen([*line, "--parallel.dtype", given.dtype], env=environment(given),
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        try:
            end = time.monotonic() + 150
            while time.monotonic() < end:
                with (
                    contextlib.suppress(OSError),
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/weight_info", timeout=2),
                ):
                    break
                if process.poll() is not None:
                    raise RuntimeError("the server ended")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(30)


def environment(given: argparse.Namespace) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(given.threads), "HF_HUB_OFFLINE": "1"}


# ------------------------------------------------------------------------------------------------ a step by phase


def steps(given: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step by phase. The first step is left out, and the last, which samples nothing for another."""
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "run.toml"
        sizes = {"prompts": 2, "samples": 4, "tokens": given.tokens}
        text = RUN.format(model=given.folder, threads=given.threads, steps=given.steps, **sizes)
        file.write_text(text)
        with served(given, sizes) if {"server", "overlap"} & set(given.only) else contextlib.nullcontext("") as address:
            asked = ["--rollout.engine", "server", "--rollout.servers", address]
            kinds = {
                "hf": [], "vllm": ["--rollout.engine", "vllm"], "server": asked,
                "overlap": [*asked, "--rollout.overlap", "1"],
            }  # fmt: skip
            for name, args in kinds.items():
                if name not in given.only:
                    continue
                run = Path(folder) / name
                line = [sys.executable, "-m", "flowrl_kernels.trainer", "train", str(file), "--run.dir", str(run)]
                line += ["--parallel.dtype", given.dtype] if given.dtype != "float32" else []
                subprocess.run([*line, *args], env=environment(given), check=True, stdout=subprocess.DEVNULL)
                rows = [json.loads(row) for row in (run / "metrics.jsonl").read_text().splitlines()]
                rows = [row for row in rows if row["kind"] == "train"][1:-1]
                figures[name] = {phase: [row[f"time/{phase}"] for row in rows] for phase in PHASES}
                figures[name]["step"] = [row["time/step"] for row in rows]
                figures[name]["tokens"] = [row["tokens"] for row in rows]
                middle = {phase: statistics.median(figures[name][phase]) for phase in (*PHASES, "step")}
                print(f"{name:20s} " + "  ".join(f"{phase} {value:.2f} s" for phase, value in middle.items()))
    return figures


def plot(document: dict[str, Any]) -> None:
    """Stacked bars: a step of each engine by phase."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = document["steps"]["figures"]
    figure, axis = plt.subplots(figsize=(7, 2.6), layout="constrained")
    left = [0.0] * len(figures)
    for phase in PHASES:
        widths = [statistics.median(made[phase]) for made in figures.values()]
        axis.barh(list(figures), widths, left=left, label=phase)
        left = [a + b for a, b in zip(left, widths)]
    axis.invert_yaxis()
    axis.set_xlabel("seconds a step")
    axis.legend(ncols=len(PHASES), loc="upper center", bbox_to_anchor=(0.5, 1.22), frameon=False)
    figure.savefig(PICTURE, dpi=110)


# ------------------------------------------------------------------------------------------------ the command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("rates", "steps", "plot"))
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=["transformers", "hf", "server", "overlap", "vllm", "bare"])
    given = parser.parse_args()
    document = json.loads(OUT.read_text()) if OUT.exists() else {}
    if given.what == "plot":
        plot(document)
        return
    torch.set_num_threads(given.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(given.threads))
    figures = {"rates": rates, "steps": steps}[given.what](given)
    name = given.what if given.dtype == "float32" else f"{given.what}, {given.dtype}"
    before = document.get(name, {}).get("figures", {})
    settings = {key: getattr(given, key) for key in ("threads", "dtype", "repeats", "steps", "tokens")}
    document[name] = {"machine": machine.describe("cpu"), "settings": settings, "figures": before | figures}
    OUT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
