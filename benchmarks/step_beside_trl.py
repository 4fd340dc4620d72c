"""One GRPO step beside TRL's: python -m benchmarks.step_beside_trl FOLDER [--out FILE.json] (minutes).

FOLDER holds a Hugging Face model; the environment is TRL's (`make .venv-trl/.installed`). Both sides train all
parameters in float32 on 4 prompts x 8 responses of 64 tokens, sampled at temperature 1 by transformers, with one AdamW
update a step and no reference model. Responses never end early, so both sides have the same tokens. Each case runs in a
process of its own; memory is that process's largest resident set. Ours is `flowrl_kernels.trainer`, step by step as
`flowrl train` runs it; TRL's is `GRPOTrainer` with its defaults but for what the case says.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Seconds = tuple[float, float]  # on the wall, and of the processor in all threads: the steadier one on a busy machine
PROMPTS, SAMPLES, TOKENS, RATE = 4, 8, 64, 1e-6
QUESTIONS = (
    "A farmer has 17 sheep and buys 5 more at the market. Then 9 of them run away. How many sheep are left?",
    "Tom reads 12 pages a day. How many pages does he read in two weeks?",
    "A train leaves at 9:40 and arrives at 11:15. How many minutes does the journey take? Explain each step.",
    "What is the sum of the first ten odd numbers?",
)
TRL = {
    "trl": {},
    "trl, activations kept": {"gradient_checkpointing": False},
    "trl, micro-batches of 8": {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
}
OURS = {
    "ours": {"share_prompts": True, "max_tokens": 1024},
    "ours, prompts repeated": {"share_prompts": False, "max_tokens": 1024},
    "ours, one micro-batch": {"share_prompts": False, "max_tokens": 8192},
}


def reward(prompt: str, response: str, answer: str) -> float:
    """The share of vowels: a figure that differs between responses and costs nothing."""
    return sum(letter in "aeiou" for letter in response) / max(1, len(response))


def prompts_of(folder: str) -> list[str]:
    """Texts in the model's chat template."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(m, tokenize=False, add_generation_prompt=True) for m in messages]


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds, less: Seconds = (0.0, 0.0)) -> Seconds:
    wall, processor = now()
    return wall - start[0] - less[0], processor - start[1] - less[1]


def phases(step: Seconds, rollout: Seconds, update: Seconds) -> dict[str, float]:
    """A step's figures: wall and processor seconds by phase; what is left over is rewards and bookkeeping."""
    rest = (step[0] - rollout[0] - update[0], step[1] - rollout[1] - update[1])
    parts = {"step": step, "rollout": rollout, "update": update, "rest": rest}
    walls = {f"{name}_s": wall for name, (wall, _) in parts.items()}
    return walls | {f"{name}_processor_s": processor for name, (_, processor) in parts.items()}


def by_trl(folder: str, steps: int, settings: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds by phase of each step of GRPOTrainer."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    class Clock(TrainerCallback):
        begun = (0.0, 0.0)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.begun = now()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            made.append(phases(since(self.begun), spent["rollout"], since(self.begun, spent["all"])))
            spent.update(rollout=(0.0, 0.0), all=(0.0, 0.0))

    made: list[dict[str, float]] = []
    spent = {"rollout": (0.0, 0.0), "all": (0.0, 0.0)}
    with tempfile.TemporaryDirectory() as out:
        shared = {"per_device_train_batch_size": PROMPTS * SAMPLES, "gradient_accumulation_steps": 1}
        args = GRPOConfig(
            output_dir=out, max_steps=steps, num_generations=SAMPLES, max_completion_length=TOKENS, learning_rate=RATE,
            lr_scheduler_type="constant", beta=0.0, loss_type="grpo", temperature=1.0, bf16=False, use_cpu=True,
            generation_kwargs={"min_new_tokens": TOKENS}, model_init_kwargs={"dtype": "float32"}, report_to="none",
            save_strategy="no", logging_steps=1, disable_tqdm=True, seed=0, **(shared | settings),
        )  # fmt: skip
        trainer = GRPOTrainer(
            model=folder,
            reward_funcs=lambda completions, **_: [reward("", text, "") for text in completions],
            args=args,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts_of(folder)]),
            callbacks=[Clock()],
        )

        def timed(name: str, inner: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                start = now()
                try:
                    return inner(*args, **kwargs)
                finally:
                    taken = since(start)
                    spent[name] = (spent[name][0] + taken[0], spent[name][1] + taken[1])

            return call

        trainer._generate_single_turn = timed("rollout", trainer._generate_single_turn)
        trainer._generate_and_score_completions = timed("all", trainer._generate_and_score_completions)
        assert next(trainer.model.parameters()).dtype is torch.float32
        trainer.train()
        lengths = [line["completions/mean_length"] for line in trainer.state.log_history if "reward" in line]
    assert set(lengths) == {float(TOKENS)}, lengths
    return made


def by_ours(folder: str, steps: int, settings: dict[str, Any]) -> list[dict[str, float]]:
    """Seconds by phase of each step of flowrl_kernels.trainer."""
    import dataclasses

    from flowrl_kernels.trainer import config as c
    from flowrl_kernels.trainer import loop, records, run, stop
    from flowrl_kernels.trainer.parallel import ALONE

    with tempfile.TemporaryDirectory() as out:
        data = Path(out) / "prompts.jsonl"
        data.write_text("".join(json.dumps({"prompt": p, "answer": "none"}) + "\n" for p in prompts_of(folder)))
        config = c.Config(
            run=c.RunConfig(dir=f"{out}/run", steps=steps),
            task=c.TaskConfig(name="file", train=str(data), test=str(data), chat_template=False,
                            reward="benchmarks.step_beside_trl:reward"),
            model=c.ModelConfig(name=folder),
            rollout=c.RolloutConfig(prompts=PROMPTS, samples=SAMPLES, max_new_tokens=TOKENS),
            algorithm=c.AlgorithmConfig(name="grpo"),
            optim=c.OptimConfig(lr=RATE, warmup=0),
            parallel=c.ParallelConfig(**settings),
            checkpoint=c.CheckpointConfig(export=False),
            eval=c.EvalConfig(start=False),
            log=c.LogConfig(progress=False, plots=False),
        )  # fmt: skip
        made = run.prepare(config, ALONE)
        made.sampling = dataclasses.replace(made.sampling, stop=())
        taken: list[dict[str, Seconds]] = []

        class Clock(records.Lap):
            def __init__(self) -> None:
                super().__init__()
                self.whole, self.part = now(), now()
                taken.append({})

            def __call__(self, name: str) -> None:
                super().__call__(name)
                taken[-1] |= {name: since(self.part), "step": since(self.whole)}
                self.part = now()

        vars(loop)["Lap"] = Clock
        with stop.watch() as watch:
            loop._steps(made, records.Progress(), watch)
        made.scorer.close()
        made.log.close()
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    assert {line["length"] for line in lines if line["kind"] == "train"} == {float(TOKENS)}
    return [phases(step["step"], step["rollout"], step["update"]) for step in taken[:steps]]


def one(case: str, folder: str, steps: int, threads: int) -> dict[str, Any]:
    """A case in this process: its steps, and the largest resident set in bytes."""
    import torch

    torch.set_num_threads(threads)
    made = by_trl(folder, steps, TRL[case]) if case in TRL else by_ours(folder, steps, OURS[case])
    return {"steps": made, "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def summed_up(case: str, found: dict[str, Any], warm: int) -> dict[str, Any]:
    """Medians over the steps after the first `warm`."""
    steps = found["steps"][warm:]
    medians = {name: round(statistics.median(step[name] for step in steps), 2) for name in steps[0]}
    tokens = PROMPTS * SAMPLES * TOKENS
    return {
        "case": case,
        "settings": TRL.get(case, OURS.get(case)),
        **medians,
        "tokens_per_s": round(tokens / medians["step_s"], 1),
        "tokens_per_processor_s": round(tokens / medians["step_processor_s"], 1),
        "peak_gb": round(found["peak_rss"] / 1e9, 2),
        "each_step_s": [round(step["step_s"], 2) for step in steps],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder")
    parser.add_argument("--cases", nargs="*", default=["trl", "ours"], choices=[*TRL, *OURS], metavar="CASE")
    parser.add_argument("--warm", type=int, default=1, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=3, help="steps that are")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(given.cases[0], given.folder, given.warm + given.steps, given.threads)))
        return
    from benchmarks.machine import describe

    made: dict[str, Any] = {"machine": describe("cpu"), "threads": given.threads, "warm": given.warm, "cases": []}
    for case in given.cases:
        command = [sys.executable, "-m", "benchmarks.step_beside_trl", given.folder, "--one", "--cases", case]
        command += [f"--{name}={getattr(given, name)}" for name in ("warm", "steps", "threads")]
        out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ).stdout
        made["cases"].append(summed_up(case, json.loads(out.splitlines()[-1]), given.warm))
        print(json.dumps(made["cases"][-1]), flush=True)
    if given.out:
        given.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
