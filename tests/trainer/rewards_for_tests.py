"""Rewards that misbehave, found by module:function from the worker processes."""

import os
import subprocess
import sys
import time


def own_task(cfg):
    from flowrl_kernels.trainer.tasks.sums import Sums

    return Sums()


def by_length(prompt, response, answer):
    return len(response) / 10


def as_told(prompt, response, answer):
    """Does what the response says."""
    print("noise on stdout")
    if response == "raise":
        raise RuntimeError("told to raise")
    if response == "hang":
        while True:
            time.sleep(1)
    if response.startswith("child"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(response.partition(" ")[2], "w") as file:
            file.write(str(child.pid))
        child.wait()
    if response == "spin":
        while True:
            pass
    if response == "exit":
        os._exit(7)
    if response == "quit":
        sys.exit(3)
    if response == "none":
        return None
    if response == "nan":
        return float("nan")
    if response == "text":
        return "1.0"
    return 1.0


not_a_function = 3
