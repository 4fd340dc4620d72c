"""`--environment` of conftest.py, by which `make test-integrations` notices tests that were skipped."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("asked", [True, False])
def test_a_run_fails_that_leaves_out_what_its_environment_is_for(asked):
    missing = [name for name in ("trl", "verl", "torchtitan") if importlib.util.find_spec(name) is None]
    if not missing:
        pytest.skip("every trainer is installed here")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_prime_rl.py")]
    command += ["--environment", missing[0]] if asked else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=HERE.parent.parent)
    assert done.returncode == asked, done.stdout[-2000:]
    assert (f"not run as environment {missing[0]} has to: ['test_" in done.stdout) == asked
