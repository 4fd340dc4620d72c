"""An evaluation as a JSON file: figures, every problem's results, and all it takes to repeat it."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from flowrl_kernels.trainer import config_file
from flowrl_kernels.trainer.config import Config
from flowrl_kernels.trainer.evaluate import Evaluation
from flowrl_kernels.trainer.policy import Policy
from flowrl_kernels.trainer.tasks.base import Problem

PACKAGES = ("flowrl-kernels", "torch", "transformers", "tokenizers", "numpy", "math-verify", "sympy", "pyarrow")
# the settings that an evaluation reads
SECTIONS = ("task.", "model.", "rollout.", "eval.", "parallel.", "run.device", "run.threads", "run.seed")


def versions() -> dict[str, str]:
    """The versions of what takes part, where installed."""
    found = {"python": platform.python_version(), "machine": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def data_hash(problems: Sequence[Problem]) -> str:
    """SHA-256 of the problems' ids, prompts and answers, in order."""
    digest = hashlib.sha256()
    for problem in problems:
        line = json.dumps([problem.id, problem.prompt, problem.answer], sort_keys=True, default=repr)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def weights_hash(policy: Policy) -> str:
    """SHA-256 of the language model's tensors, names and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(policy.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return digest.hexdigest()


def contents(
    config: Config, source: str, checkpoint: str | None, split: str, done: Evaluation, policy: Policy
) -> dict[str, Any]:
    """What `write` writes; rewards are null where a response could not be scored."""
    rows, at = [], 0
    for problem, answers in zip(done.problems, done.answers):
        rewards = done.rewards[at : at + len(answers)]
        at += len(answers)
        rows.append(
            {
                "id": problem.id,
                "prompt": problem.prompt,
                "answer": problem.answer,
                "rewards": rewards,
                "tokens": [answer.tokens for answer in answers],
                "finished": [answer.finished for answer in answers],
                "responses": [answer.text for answer in answers],
            }
        )
    settings = {key: value for key, value in config_file.flat(config).items() if key.startswith(SECTIONS)}
    return {
        "figures": done.figures,
        "split": split,
        "seed": config.eval.seed,
        "source": source,
        "checkpoint": checkpoint,
        "settings": settings,
        "hashes": {"problems": data_hash(done.problems), "weights": weights_hash(policy)},
        "versions": versions(),
        "unscorable_reasons": done.reasons,
        "problems": rows,
    }


def write(folder: Path, found: dict[str, Any]) -> Path:
    """`found` as FOLDER/SPLIT-CHECKPOINT-HASH.json, by the hash of all it depends on: a repetition replaces its like.

    Raises OSError where the folder cannot be written.
    """
    keys = ("split", "seed", "source", "checkpoint", "settings", "hashes", "versions")
    made_of = json.dumps({key: found[key] for key in keys}, sort_keys=True, default=repr)
    name = f"{found['split']}-{found['checkpoint'] or 'model'}-{hashlib.sha256(made_of.encode()).hexdigest()[:8]}.json"
    return save(folder / name, found)


def save(path: Path, found: dict[str, Any]) -> Path:
    """`found` as a JSON file, whole or not at all; a number that is not finite becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".incomplete")
    partial.write_text(json.dumps(_finite(found), indent=1, default=repr, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
