"""Runs each file of tests/interpreter in a process of its own: the interpreter is chosen when triton is imported.

Then what it cannot see: it loads zeros where a load is masked and says nothing else, and fuses nothing.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton", reason="triton is not installed: the kernels are unproved here")
ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "tests" / "interpreter").glob("test_*.py"))
NIGHTLY = [file for file in FILES if "mark.nightly" in file.read_text()]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a minute or two each, several times that beside other work
@pytest.mark.parametrize(
    ("file", "marked"),
    [(file, "not nightly") for file in FILES]
    + [pytest.param(f, "nightly", marks=pytest.mark.nightly) for f in NIGHTLY],
    ids=lambda given: given.stem if isinstance(given, Path) else given,
)
def test_the_kernels_are_right_under_the_interpreter(file, marked):
    if triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
        pytest.skip("triton 3.6's interpreter wants numpy below 2.4: the kernels are unproved here")
    done = run(
        "-m", "pytest", str(file), "-m", marked, "-p", "no:xdist", "-p", "no:cacheprovider",
        "-W", "ignore::RuntimeWarning",
        TRITON_INTERPRET="1", OMP_NUM_THREADS="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout, done.stdout


def calls():
    for file in sorted((ROOT / "flowrl_kernels" / "triton").glob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                yield f"{file.name}:{node.lineno}", ast.unparse(node.func), {keyword.arg for keyword in node.keywords}


def test_every_masked_load_says_what_it_gives_where_it_is_off():
    loads = [(place, names) for place, function, names in calls() if function == "tl.load"]
    assert len(loads) > 100
    assert [place for place, names in loads if "mask" in names and "other" not in names] == []


def test_every_launch_leaves_multiply_adds_as_they_are_written():
    launches = [(place, names) for place, function, names in calls() if "_kernel[" in function]
    assert len(launches) > 15
    assert [place for place, names in launches if not names & {"enable_fp_fusion", None}] == []  # None: ** of settings


def test_the_kernel_folder_does_not_shadow_triton():
    done = run("-c", "import flowrl_kernels, triton; print(triton.__file__)")
    assert done.returncode == 0, done.stderr
    assert (ROOT / "flowrl_kernels") not in Path(done.stdout.strip()).parents


def test_importing_the_package_imports_no_triton():
    done = run("-c", "import sys, flowrl_kernels; sys.exit(any(m.split('.')[0] == 'triton' for m in sys.modules))")
    assert done.returncode == 0, "triton (or torch's use of it) was imported" + done.stderr
