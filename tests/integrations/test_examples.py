"""Each file of examples/ runs, and what it trains gets better. Where its package is missing it is skipped, by name."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
NEEDS = {
    "plain_pytorch": ["transformers"],
    "transformers_trainer": ["transformers", "accelerate"],
    "accelerate_loop": ["transformers", "accelerate"],
    "lightning_module": ["transformers", "lightning"],
    "trl_flowrl": ["trl"],
    "verl_flowrl": ["verl"],
}
STAND_INS = {"slime_flowrl", "nemo_rl_flowrl", "openrlhf_flowrl", "open_instruct_flowrl"}  # test_other_trainers.py
OWN = {
    "arithmetic",
    "from_python",
    "smol",
    "topk_distillation",
}  # data, rewards and a loss: tests/trainer/test_own_data.py, test_entry.py, test_smol.py, tests/test_several.py


def test_every_example_is_run_by_a_test():
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*NEEDS, *STAND_INS, *OWN, "common"}


@pytest.mark.parametrize("name", [name for name in NEEDS if name != "verl_flowrl"])
def test_the_example_trains(name, monkeypatch):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"examples/{name}.py needs {package}: `make test-integrations`")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    squared = importlib.import_module(name).main(steps=30)
    assert len(squared) == 30
    assert sum(squared[-5:]) < 0.7 * sum(squared[:5]), squared


def test_three_loops_around_one_module_train_the_same_numbers(monkeypatch):
    pytest.importorskip("lightning", reason="lightning and accelerate are needed: `make test-integrations`")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    plain, *others = (
        importlib.import_module(name).main(steps=4) for name in ("plain_pytorch", "accelerate_loop", "lightning_module")
    )
    for other in others:
        assert other == pytest.approx(plain, rel=1e-3)


def test_the_verl_example_registers_its_settings():
    pytest.importorskip("verl", reason="examples/verl_flowrl.py needs verl: `make test-integrations`")
    env = os.environ | {"PYTHONPATH": str(EXAMPLES), "VERL_USE_EXTERNAL_MODULES": "verl_flowrl"}
    command = [sys.executable, "-c", "import verl, verl_flowrl; print(verl_flowrl.main())"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "'flowrl_mild'" in done.stdout
    assert "'flowrl_release'" in done.stdout
