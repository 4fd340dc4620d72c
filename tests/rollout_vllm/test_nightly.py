"""At full length, for `make nightly-vllm`: a language model through each engine, ranks that share one, Sums to 600."""

import json
import statistics
import subprocess
import sys

import pytest
import runs

pytestmark = [pytest.mark.nightly, pytest.mark.timeout(5400)]
LANGUAGE_MODEL = """
[run]
steps = 3
threads = 2
[task]
name = "countdown"
[model]
name = "{model}"
[rollout]
prompts = 2
samples = 4
max_new_tokens = 32
[algorithm]
name = "grpo"
entropy = 0.01  # countdown is too hard for it: something has to move the weights
[optim]
lr = 1e-5
warmup = 0
[eval]
start = false
problems = 2
samples = 1
[checkpoint]
export = false
[log]
progress = false
plots = false
"""
SUMS = """
[run]
steps = 600
threads = 1
[task]
name = "warm_sums:task"
[model]
heads = 2
context = 16
[warm]
steps = 300
[rollout]
max_new_tokens = 6
[algorithm]
reward = "raw"
beta = 1.5
[log_z]
lr = 1e-2
[optim]
lr = 5e-4
[parallel]
max_tokens = 4096
row_tokens = 80
[eval]
every = 100
problems = 0
[checkpoint]
export = false
[log]
progress = false
plots = false
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("engine", ["vllm", "server"])
def test_a_language_model_trains_some_steps_in_step(engine, dtype, smollm2, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(LANGUAGE_MODEL.format(model=smollm2))
    more = ["--parallel.dtype", dtype]
    if engine == "server":
        server = runs.Server(file, tmp_path / "server.log", *more, "--rollout.kv_cache", "1.0")
        more += ["--rollout.servers", server.wait().address]
    try:
        lines = runs.train(file, tmp_path / "run", "--rollout.engine", engine, *more, timeout=900)
    finally:
        if engine == "server":
            server.kill()
    assert [x["step"] for x in lines] == [1, 2, 3]
    assert all(x["grad_norm"] > 0 for x in lines)
    print(engine, dtype, [x["probe_gap"] for x in lines])
    assert max(x["probe_gap"] for x in lines) < (1e-4 if dtype == "float32" else 0.5)


@pytest.mark.distributed
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_ranks_with_an_engine_each_or_one_together_train_as_one_does(tensor_parallel, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(runs.TOML)
    args = ["--run.steps", "4", "--rollout.engine", "vllm", *runs.SMALL_CACHE]
    one = runs.train(file, tmp_path / "one", *args)
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
            "flowrl_kernels.trainer", "train", str(file), "--run.dir", str(tmp_path / "two"), *args,
            "--rollout.tensor_parallel", str(tensor_parallel)]  # fmt: skip
    subprocess.run(line, env=runs.environment(), check=True, timeout=300)
    two = runs.steps(tmp_path / "two")
    assert max(x["probe_gap"] for x in two) < 2e-5
    assert [x["reward"] for x in two] == pytest.approx([x["reward"] for x in one])


def curves(folder):
    """[step -> exact accuracy] of a run's evaluations."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {x["step"]: x["exact_accuracy"] for x in lines if x["kind"] == "eval"}


@pytest.mark.parametrize(("engine", "until"), [("vllm", 600), ("server", 100)])
def test_sums_by_vllm_is_at_equal_steps_as_far_as_by_transformers_over_three_seeds(engine, until, tmp_path):
    file = tmp_path / "run.toml"
    file.write_text(SUMS)
    more = ["--run.steps", str(until), "--rollout.engine", engine]
    server = None
    if engine == "server":
        server = runs.Server(file, tmp_path / "server.log", *runs.SMALL_CACHE)
        more += ["--rollout.servers", server.wait().address]
    try:
        for seed in range(3):
            common = ["--run.seed", str(seed)]
            runs.train(file, tmp_path / f"live{seed}", *common, "--run.steps", str(until), timeout=1200)
            lines = runs.train(file, tmp_path / f"other{seed}", *common, *more, timeout=1200)
            assert max(x["probe_gap"] for x in lines) < 1e-4
    finally:
        if server is not None:
            server.kill()
    live, other = ([curves(tmp_path / f"{name}{seed}") for seed in range(3)] for name in ("live", "other"))
    for curve in live + other:  # something was learned, so that there is something to compare
        assert curve[until] > curve[0] + 0.1, (live, other)
    for step in live[0]:
        a, b = [c[step] for c in live], [c[step] for c in other]
        print(engine, step, a, b)
        spread = max(statistics.stdev(a), statistics.stdev(b), 0.005)
        assert abs(statistics.mean(a) - statistics.mean(b)) < 3 * spread, (step, a, b)
