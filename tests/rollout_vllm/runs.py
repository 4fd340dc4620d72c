"""Runs and servers in processes of their own, as a user starts them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
# vLLM's CPU attention takes heads of 32 and more: two of them; a reward that is learnt in 30 steps
TOML = """
[run]
steps = 30
threads = 1
[task]
name = "sums"
reward = "first_digit:threes"
[model]
heads = 2
context = 16
[warm]
steps = 100
[rollout]
max_new_tokens = 6
[algorithm]
name = "grpo"
[optim]
lr = 1e-3
[parallel]
max_tokens = 4096
row_tokens = 80
[eval]
start = false
exact = false
samples = 4
problems = 4
[log]
progress = false
plots = false
"""
SMALL_CACHE = ["--rollout.kv_cache", "0.0625"]
# a trainer to which vllm is not there, whatever is installed
BLIND = (
    "import sys; sys.modules['vllm'] = None; "
    "from flowrl_kernels.trainer.__main__ import cli; sys.exit(cli(sys.argv[1:]))"
)


def environment():
    path = os.pathsep.join([str(HERE), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def begin(file, folder, *args, blind=False):
    """`flowrl train`, started."""
    how = ["-c", BLIND] if blind else ["-m", "flowrl_kernels.trainer"]
    line = [sys.executable, *how, "train", str(file), "--run.dir", str(folder), *args]
    output = open(f"{folder}.log", "w")  # noqa: SIM115 (the process writes it)
    return subprocess.Popen(line, env=environment(), stdout=output, stderr=subprocess.STDOUT)


def train(file, folder, *args, blind=False, timeout=240):
    """`flowrl train` to its end; the lines of its steps."""
    process = begin(file, folder, *args, blind=blind)
    assert process.wait(timeout) == 0, Path(f"{folder}.log").read_text()[-3000:]
    return steps(folder)


def steps(folder):
    file = Path(folder) / "metrics.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")] if file.exists() else []
    return [line for line in lines if line["kind"] == "train"]


class Server:
    """`make serve`, in a session of its own."""

    def __init__(self, file, log, *args):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.line = [sys.executable, "-m", "flowrl_kernels.trainer.rollout.serve", str(file), "--port", str(self.port)]
        self.line += args
        self.log = log
        self.start()

    def start(self):
        with open(self.log, "a") as output:
            self.process = subprocess.Popen(
                self.line, env=environment(), stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait(self, timeout=150):
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.address}/weight_info", timeout=2):
                return self
            assert self.process.poll() is None, Path(self.log).read_text()[-3000:]
            time.sleep(0.3)
        raise TimeoutError(Path(self.log).read_text()[-3000:])

    def kill(self):
        """kill -9, its workers too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
