"""The GPU script and what it tunes: what it asks, what it says without a GPU, and that it ends at its limit."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import json
import os
import re
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from benchmarks import doubts
from benchmarks.cases import CASES, Case, choose
from benchmarks.peers import load, rl_kernel

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize("mode", ["check", "tune", "bench"])
def test_gpu_check_says_what_was_not_proved_without_a_gpu(mode, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    made = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), mode, str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable},
    )  # fmt: skip
    assert made.returncode == 2
    assert "NOT PROVED" in made.stdout
    assert json.loads((tmp_path / f"{mode}.json").read_text())["gpu"] is False


def test_gpu_check_asks_for_cases_and_implementations_that_exist():
    script = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    cases = [name.strip("'") for name in re.findall(r"--case (\S+)", script)]
    assert len(cases) > 10
    for name in cases:
        assert all(case.device == "cuda" for case in choose([name], "cuda", quick=False)), name
    peers = load()
    assert {"ours-triton-bounded", "ours-triton-loss-single-pass"} <= set(peers)
    asked = re.findall(r"--impl ([\w.-]+)", script)
    assert set(asked) <= set(peers)
    assert {name for name, peer in peers.items() if not name.startswith("ours")} <= set(asked)
    # what the bars are about is asked for, by case, of the implementations that can do it
    bars = {
        "llama-3.1-8b-8k-loss": "ours-triton-loss-single-pass",
        "qwen2.5-7b-32k-bounded-0.01": "ours-triton-bounded",
    }
    for name, peer in bars.items():
        assert name in cases
        assert CASES[name].op in peers[peer].ops
        assert peers[peer].refusal(CASES[name]) is None


@pytest.mark.parametrize("mode", ["check", "tune", "bench"])
def test_gpu_check_ends_at_its_limit_and_leaves_json_whatever_hangs(mode, tmp_path):
    python = tmp_path / "python"  # sees a GPU, then never ends
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 0\n[ "$1" = - ] && exit 0\nexec sleep 100\n')
    python.chmod(0o755)
    begin = time.monotonic()
    made = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), mode, str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHON": str(python), "LIMIT": "2"}, timeout=60,
    )  # fmt: skip
    assert time.monotonic() - begin < 30
    assert made.returncode not in (0, 2), made.stdout
    said = json.loads((tmp_path / f"{mode}.json").read_text())
    assert said["kind"] == mode
    assert said["gpu"] is True
    if mode == "bench":
        assert set(said.values()) >= {"not run"}
    else:
        assert 124 in said.values()


def test_gpu_check_leaves_what_broke_the_gpu_out_of_a_second_try(tmp_path):
    python = tmp_path / "python"  # loses the GPU to cce wherever it may run
    python.write_text(
        '#!/bin/sh\n[ "$1 $2" = "-m benchmarks" ] || exit 0\n'
        'case "$*" in *"--broken cce"*) exit 0;; *"--impl cce"*) echo "lost the GPU to cce"; exit 3;; esac\n'
    )
    python.chmod(0o755)
    made = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu_check.sh"), "bench", str(tmp_path)],
        capture_output=True, text=True, env={**os.environ, "PYTHON": str(python)}, timeout=60,
    )  # fmt: skip
    assert made.returncode == 1
    assert made.stdout.count("lost the GPU to cce") == 2  # peers, scaling
    said = json.loads((tmp_path / "bench.json").read_text())
    assert {said[tag] for tag in ("exact", "bounded", "precision", "peers", "scaling")} == {"exit 0"}


def test_what_reading_left_in_doubt_is_asked_first_and_says_so_without_a_gpu(tmp_path, capsys):
    text = (ROOT / "benchmarks" / "gpu_check.sh").read_text()
    assert text.index("benchmarks.doubts") < text.index("-m gpu")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert doubts.main(["--out", str(tmp_path / "doubts.json")]) == 2
    assert "NOT PROVED" in capsys.readouterr().out
    pytest.importorskip("triton", reason="triton is not installed")
    asked = doubts.sums_in_place("cpu")  # the same question to another device
    assert asked["right"]
    assert set(asked["relative_error"]) == {"bfloat16", "float16"}


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", ["rl-kernel-triton", "rl-kernel-logp-triton"])
def test_rl_kernel_is_found_in_the_place_it_had_and_in_the_one_it_has(name, moved, monkeypatch):
    stem, kind = ("batch_invariant_logp", "BatchInvariantLogp") if "-logp-" in name else ("linear_logp", "LinearLogp")
    room = rl_kernel.TRITON[0 if moved else 1]
    module = types.ModuleType(f"{room}.{stem}")
    operator = type(f"Triton{kind}Op", (), {"__call__": lambda self, *given, **_: given[0].sum(-1)})
    setattr(module, operator.__name__, operator)
    parts = room.split(".")
    for end in range(1, len(parts) + 1):
        package = types.ModuleType(".".join(parts[:end]))
        package.__path__ = []
        package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
        monkeypatch.setitem(sys.modules, package.__name__, package)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    rl_kernel._operator.cache_clear()
    peer = load()[name]
    assert peer.usable("cpu") == (False, "RL-Kernel (no version) is installed; its kernels need a CUDA GPU")
    assert peer.usable("cuda")[0]
    case = CASES["logprob-8k" if "-logp-" in name else "qwen2.5-7b-8k"]
    assert peer.refusal(case) is None
    assert peer.refusal(dataclasses.replace(case, entropy=True)) == "returns no entropy"
    rl_kernel._operator.cache_clear()


def test_gpu_check_refuses_a_mode_it_does_not_know(tmp_path):
    script = str(ROOT / "benchmarks" / "gpu_check.sh")
    for arguments in ([], ["bench"], ["race", str(tmp_path)]):
        made = subprocess.run(["bash", script, *arguments], capture_output=True, text=True)
        assert made.returncode == 64
        assert "usage" in made.stderr


def test_what_the_steps_choose_is_timed_with_what_it_computed():
    pytest.importorskip("triton", reason="triton is not installed")
    from benchmarks import tune_steps

    later = time.monotonic() + 600
    rl = Case("tiny-rl", "linear_logprob", "cpu", 128, 32, 4096, level="rl", sequences=2)
    made = tune_steps.bounded(rl, "cpu", 1, later, impl="chunked")
    exact, *bounded = made["backward"]
    assert exact["epsilon"] == 0.0
    assert len(bounded) == len(tune_steps.COLUMNS) * len(tune_steps.EPSILONS)
    for run_ in made["backward"]:
        assert run_["median_ms"] > 0, run_
    loss = Case("tiny-loss", "flowrl_loss", "cpu", 64, 16, 512, sequences=4)
    made = tune_steps.single_pass(loss, "cpu", 1, later, impl="chunked")
    assert [entry["passes"] for entry in made["step"]] == [2, 1, 1, 1]
    assert all(entry["median_ms"] > 0 for entry in made["step"]), made
    assert len(tune_steps.bounded(rl, "cpu", 1, 0.0, impl="chunked")["backward"]) == 1  # out of time
    json.dumps(made)
    for case in tune_steps.cases(8192):
        assert case.n % case.sequences == 0
