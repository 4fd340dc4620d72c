"""Rewards that misbehave, found by module:function from the worker processes."""

import os
import subprocess
import sys
import time
from decimal import Decimal
from fractions import Fraction

import numpy as np


def own_task(cfg):
    from flowrl_kernels.trainer.tasks.sums import Sums

    return Sums()


def by_length(prompt, response, answer):
    return len(response) / 10


def odd(prompt, response, answer):
    """0 or 1, each for about half of all responses."""
    return float(sum(map(ord, response)) % 2)


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
    if response == "silent":
        raise Unspeakable
    if response == "long":
        raise ValueError("x\n" * 100000)
    if response == "loud":
        print("x" * 1_000_000)
    if response.startswith("give "):
        return GIVEN[response.removeprefix("give ")]()
    return 1.0


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no text")


def _tensor(*shape):
    import torch

    return torch.full(shape, 0.5, requires_grad=True)


GIVEN = {
    "bool": lambda: True,
    "int": lambda: 2,
    "decimal": lambda: Decimal("0.25"),
    "fraction": lambda: Fraction(1, 4),
    "float32": lambda: np.float32(0.5),
    "numpy bool": lambda: np.bool_(False),
    "array": lambda: np.array(0.5),
    "array of one": lambda: np.array([0.5]),
    "array of two": lambda: np.array([0.5, 1.0]),
    "tensor": lambda: _tensor(),
    "tensor of two": lambda: _tensor(2),
    "complex": lambda: 1j,
    "inf": lambda: float("inf"),
    "huge": lambda: 10**400,
    "list": lambda: [1.0],
    "dict": lambda: {"score": 1.0},
}


async def later(prompt, response, answer):
    return 1.0


def two_arguments(response, answer):
    return 1.0


class Reward:
    def __init__(self, prompt, response, answer):
        pass


not_a_function = 3
