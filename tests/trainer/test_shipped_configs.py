"""Every shipped config runs to its end: its own settings, at sizes of a test."""

import json
from pathlib import Path

import pytest
import tiny

from flowrl_kernels.trainer import config_file, loop
from flowrl_kernels.trainer import policy as policies
from flowrl_kernels.trainer.config import check
from flowrl_kernels.trainer.tasks import char_tokenizer

CONFIGS = Path(config_file.__file__).parents[2] / "configs"
SMALLER = tiny.flags("""
    run.steps 2  run.threads 1  rollout.prompts 4  rollout.samples 4  rollout.max_new_tokens 8  optim.warmup 1
    eval.samples 2  eval.problems 2  log.progress False
""")
OWN = {
    "sums": tiny.flags("model.hidden 32  model.layers 1  warm.steps 2  warm.batch 8  rollout.max_new_tokens 6"),
    "countdown": tiny.flags(
        "model.hidden 32  model.layers 1  warm.steps 2  warm.batch 8  rollout.max_new_tokens 20  task.held_out 4"
    ),
    # micro-batches, minibatches and intervals in proportion; its model and data are made here
    "math_7b": tiny.flags(
        "algorithm.minibatch_prompts 2  rollout.max_prompt_tokens 12  parallel.max_tokens 20  task.reward_workers 1 "
        " checkpoint.every 1  eval.every 1"
    ),
    "smol": [],
    "smol_gym": tiny.flags("task.size 8  task.held_out 4  task.reward_workers 1"),
}
NAMED = ("math_7b", "smol", "smol_gym")  # their model is a folder


def model_and_data(folder):
    """Flags that name a tiny model and nine sums, in place of a config's own."""
    cfg = tiny.config(model={"context": 96})
    letters = tiny.ALPHABET + " :SadefghilmnoprtwT-"  # those of a generator's question too
    policies.build_model(cfg, char_tokenizer(letters), "sdpa").save_pretrained(folder / "model")
    char_tokenizer(letters).save_pretrained(folder / "model")
    rows = [{"prompt": f"{i}+{j}=", "answer": str(i + j)} for i in range(3) for j in range(3)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = ["--model.name", str(folder / "model")]
    return source + [w for split in ("train", "valid", "test") for w in (f"--task.{split}", str(folder / "data.jsonl"))]


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_a_shipped_config_runs_to_its_end(tmp_path, file):
    shipped = config_file.load(file)
    check(shipped, 8 if file.stem == "math_7b" else 1)
    place = ["--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "cache")]
    own = model_and_data(tmp_path) if file.stem in NAMED else []
    config = config_file.override(shipped, [*SMALLER, *OWN[file.stem], *place, *own])
    final = loop.train(config)
    assert {"accuracy", "reward", "length"} <= final.keys()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2]
    evaluated = [(line["step"], line["split"]) for line in lines if line["kind"] == "eval"]
    assert evaluated[0] == (0, "test")
    assert evaluated[-1] == (2, "test")
    assert ((1, "valid") in evaluated) == (file.stem == "math_7b")
    assert (tmp_path / "run" / "final" / "model.safetensors").exists()
    assert (tmp_path / "run" / "plots" / "overview.png").exists()
