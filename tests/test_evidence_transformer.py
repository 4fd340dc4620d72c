"""The transformer of configs/sums.toml comes as near to its target as the page says."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.evidence import transformer

ROOT = Path(__file__).parent.parent
COMMAND = (
    "import json, sys; from pathlib import Path; from benchmarks.evidence import transformer;"
    " print(json.dumps(transformer.train(Path(sys.argv[1]))))"
)


def test_what_is_left_is_read_off_the_first_and_the_last_evaluation(tmp_path):
    first, last = (dict.fromkeys(transformer.FIGURES, x) for x in (2.0, 0.25))
    lines = [
        {"kind": "eval", "step": 0, "split": "test", **first},
        {"kind": "train", "step": 1, "time/step": 30.0},
        {"kind": "eval", "step": 1, "split": "test", **last},
        {"kind": "final", "step": 1, **last},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.toml").write_text("[run]\nseed = 7\n")
    made = transformer.measured(tmp_path)
    assert (made["kl_left"], made["steps"], made["seed"], made["minutes"]) == (0.125, 1, 7, 0.5)


def test_the_run_that_is_kept_is_the_one_that_is_claimed():
    made = json.loads(transformer.OUT.read_text())
    assert made["steps"] == transformer.STEPS
    assert made["beta"] == transformer.BETA
    assert made["kl_left"] == pytest.approx(made["end"]["exact_kl"] / made["start"]["exact_kl"], abs=2e-4)
    assert made["kl_left"] <= transformer.MOST


@pytest.mark.nightly
@pytest.mark.timeout(7200)  # a quarter of an hour of one core of its own
def test_trajectory_balance_leaves_a_seventh_of_the_kl_and_writes_nothing_outside_its_folder(tmp_path):
    places = {name: tmp_path / name.lower() for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "CWD")}
    for place in places.values():
        place.mkdir()
    environment = os.environ | {name: str(place) for name, place in places.items() if name != "CWD"}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    began = time.time()
    out = subprocess.run(
        [sys.executable, "-c", COMMAND, str(tmp_path / "run")], cwd=places["CWD"], env=environment, text=True,
        stdout=subprocess.PIPE, check=True,
    ).stdout  # fmt: skip
    made = json.loads(out.splitlines()[-1])
    assert made["steps"] == transformer.STEPS
    assert made["start"]["exact_kl"] > 1.0
    assert made["kl_left"] <= transformer.MOST, made
    assert made["end"]["log_z_error"] < 0.5, made
    for name, place in places.items():
        assert not list(place.rglob("*")), f"written into {name}"
    written = [
        path for package in ("flowrl_kernels", "benchmarks", "configs", "docs")
        for path in (ROOT / package).rglob("*") if path.is_file() and path.stat().st_mtime > began
    ]  # fmt: skip
    assert not written
