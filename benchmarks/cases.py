"""The named cases, with the arithmetic and the traffic that each must do.

Axis letters: N packed tokens, H hidden size, V vocabulary, B sequences, T padded response slots.
"""

from __future__ import annotations

import fnmatch
from dataclasses import asdict, dataclass

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# Entropy levels of the next-token distribution, flat to late in RL: see inputs.py for how each is made.
HEAD_OPS = ("linear_logprob", "flowrl_loss")  # those that begin at hidden states
LEVELS = ("flat", "base", "peaked", "rl", "late-rl")


@dataclass(frozen=True)
class Case:
    """One workload.

    op: "linear_logprob" (hidden states -> log-probs), "logprob" (logits -> log-probs), "residual" (log-probs -> loss),
        "flowrl_loss" (hidden states -> loss, first minibatch: w = 1).
    n, h, v: packed tokens, hidden size, vocabulary. For "residual", n = sequences * slots and h, v are 0.
    device: "cpu" or "cuda", the class of machine that the shape is meant for.
    level: entropy level of the logits; `peak` replaces its largest |logit| where given.
    train_head: False freezes the weight (no dW).
    entropy: also return the entropy and take a gradient through it.
    zipf: exponent of the token frequencies in RL-like batches.
    epsilon: bound on the relative L1 error of dZ for implementations that have a bounded backward; 0 is exact.
    """

    name: str
    op: str
    device: str
    n: int
    h: int
    v: int
    dtype: str = "fp32"
    level: str = "base"
    sequences: int = 8
    train_head: bool = True
    entropy: bool = False
    epsilon: float = 0.0
    peak: float | None = None
    zipf: float = 1.0
    group: str = "shapes"  # which plot the case belongs to
    default: bool = True  # run without being asked for by name

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def slots(self) -> int:
        """Response slots T of one sequence."""
        return self.n // self.sequences

    def flops(self) -> dict[str, float]:
        """Floating-point operations of the matrix products (2 per multiply-add); the rest is left out.

        forward: 2NHV. step: forward + dX (2NHV) + dW (2NHV, unless the head is frozen): what any exact method must
        do. step_recompute: one more 2NHV for methods that rebuild the logits in the backward pass.
        """
        product = 2.0 * self.n * self.h * self.v if self.op in HEAD_OPS else 0.0
        step = product * (3 if self.train_head else 2)
        return {"forward": product, "step": step, "step_recompute": step + product}

    def bytes(self) -> dict[str, float]:
        """Fewest bytes through device memory: each input read once, each output written once."""
        size = self.torch_dtype.itemsize
        rows = self.n * (8 + 4 + (4 if self.entropy else 0))  # int64 target in, fp32 log-prob (and entropy) out
        if self.op in HEAD_OPS:
            inputs = (self.n * self.h + self.v * self.h) * size
            grads = (self.n * self.h + (self.v * self.h if self.train_head else 0)) * size
            return {"forward": inputs + rows, "step": 2 * inputs + grads + 2 * rows}
        if self.op == "logprob":
            logits = self.n * self.v * size
            return {"forward": logits + rows, "step": 3 * logits + 2 * rows}  # read; read and write
        # residual: log-probs, reference and old ones, mask in; the gradient out
        forward = self.n * (3 * 4 + 1)
        return {"forward": forward, "step": forward + self.n * (1 + 4)}

    def logits_bytes(self) -> int:
        """Size of the [N, V] tensor this library does not make."""
        return self.n * self.v * self.torch_dtype.itemsize

    def record(self) -> dict:
        """The case as it goes into the JSON, with its counts."""
        return {**asdict(self), "flops": self.flops(), "bytes": self.bytes(), "logits_bytes": self.logits_bytes()}


# (H, V) of the output heads. Qwen2.5 1.5B has 151936 rows, 7B and larger 152064.
HEADS = {
    "qwen2.5-0.5b": (896, 151936),
    "qwen2.5-1.5b": (1536, 151936),
    "qwen2.5-7b": (3584, 152064),
    "qwen2.5-32b": (5120, 152064),
    "llama-3.1-8b": (4096, 128256),
}


def _cpu_cases() -> list[Case]:
    cases = [
        Case("cpu-small", "linear_logprob", "cpu", 256, 128, 8192),
        Case("cpu-small-entropy", "linear_logprob", "cpu", 256, 128, 8192, entropy=True),
        Case("cpu-small-frozen", "linear_logprob", "cpu", 256, 128, 8192, train_head=False),
        Case("cpu-small-bf16", "linear_logprob", "cpu", 256, 128, 8192, dtype="bf16"),
        Case("cpu-small-bounded", "linear_logprob", "cpu", 256, 128, 8192, level="rl", epsilon=0.01, sequences=4),
        Case("cpu-logprob", "logprob", "cpu", 256, 0, 8192),
        Case("cpu-residual", "residual", "cpu", 256 * 512, 0, 0, sequences=256),
    ]
    cases.append(Case("cpu-flowrl-loss", "flowrl_loss", "cpu", 256, 128, 8192))
    for n in (256, 512, 1024, 2048, 4096):
        cases.append(Case(f"cpu-scaling-{n}", "linear_logprob", "cpu", n, 256, 32768, group="scaling"))
    for peak in (4, 8, 16, 24, 32, 40):
        cases.append(
            Case(
                f"cpu-precision-{peak}", "linear_logprob", "cpu", 256, 128, 8192,
                dtype="bf16", level="peaked", peak=float(peak), group="precision",
            )
        )  # fmt: skip
    for epsilon in (0.0, 1e-3, 3e-3, 1e-2, 3e-2):
        cases.append(
            Case(
                f"cpu-bounded-{epsilon:g}", "linear_logprob", "cpu", 512, 256, 32768,
                level="rl", epsilon=epsilon, group="bounded", sequences=8,
            )
        )  # fmt: skip
    contract = HEADS["qwen2.5-0.5b"]
    cases.append(
        Case("cpu-contract", "linear_logprob", "cpu", 1024, *contract, level="base", group="contract", default=False)
    )
    cases.append(
        Case(
            "cpu-contract-rl", "linear_logprob", "cpu", 1024, *contract,
            level="rl", epsilon=0.01, group="contract", sequences=16, default=False,
        )
    )  # fmt: skip
    cases.append(
        Case(
            "cpu-contract-rl-zipf1.2", "linear_logprob", "cpu", 1024, *contract,
            level="rl", epsilon=0.01, zipf=1.2, group="contract", sequences=16, default=False,
        )
    )  # fmt: skip
    cases.append(
        Case("cpu-contract-loss", "flowrl_loss", "cpu", 1024, *contract, group="contract", sequences=16, default=False)
    )
    return cases


def _gpu_cases() -> list[Case]:
    cases = []

    def add(head: str, n: int, suffix: str = "", **settings) -> None:
        name = f"{head}-{n // 1024}k{suffix}"
        h, v = HEADS[head]
        length = 64 if settings.get("level") in ("rl", "late-rl") else 1024  # as their generator makes them
        settings = {"dtype": "bf16", "sequences": n // length, **settings}
        cases.append(Case(name, "linear_logprob", "cuda", n, h, v, **settings))

    add("qwen2.5-7b", 8192)
    add("llama-3.1-8b", 8192)
    add("qwen2.5-1.5b", 8192)
    add("qwen2.5-32b", 8192, default=False)
    add("qwen2.5-7b", 8192, "-entropy", entropy=True)
    add("qwen2.5-7b", 8192, "-frozen", train_head=False)
    for n in (4096, 8192, 16384, 32768, 65536):
        add("qwen2.5-7b", n, "-scaling", group="scaling")
        for head in ("qwen2.5-1.5b", "qwen2.5-32b", "llama-3.1-8b"):
            add(head, n, "-scaling", group=f"scaling-{head}", default=False)
    for level in LEVELS:
        add("qwen2.5-7b", 8192, f"-{level}", level=level, group="levels")
    for epsilon in (0.0, 1e-3, 3e-3, 1e-2, 3e-2):
        add("qwen2.5-7b", 32768, f"-bounded-{epsilon:g}", level="rl", epsilon=epsilon, group="bounded")
    add("qwen2.5-7b", 32768, "-bounded-zipf1.2", level="rl", epsilon=1e-2, zipf=1.2)
    for peak in (4, 8, 16, 24, 32, 40):
        cases.append(
            Case(
                f"precision-{peak}", "linear_logprob", "cuda", 1024, 3584, 32768,
                dtype="bf16", level="peaked", peak=float(peak), group="precision",
            )
        )  # fmt: skip
    h, v = HEADS["llama-3.1-8b"]
    cases.append(Case("llama-3.1-8b-8k-loss", "flowrl_loss", "cuda", 8192, h, v, dtype="bf16", sequences=8))
    cases.append(Case("logprob-8k", "logprob", "cuda", 8192, 0, 152064, dtype="bf16"))
    cases.append(Case("logprob-8k-entropy", "logprob", "cuda", 8192, 0, 152064, dtype="bf16", entropy=True))
    cases.append(Case("residual-256x8192", "residual", "cuda", 256 * 8192, 0, 0, sequences=256))
    return cases


CASES: dict[str, Case] = {case.name: case for case in _cpu_cases() + _gpu_cases()}


def choose(patterns: list[str], device: str, quick: bool) -> list[Case]:
    """Cases whose names match a pattern (shell wildcards); none given: the defaults of the device.

    `quick` keeps the plain cases and drops the sweeps. Raises ValueError for a pattern that matches nothing.
    """
    if not patterns:
        mine = [case for case in CASES.values() if case.device == device and case.default]
        return [case for case in mine if case.group == "shapes"] if quick else mine
    chosen: dict[str, Case] = {}
    for pattern in patterns:
        names = fnmatch.filter(CASES, pattern)
        if not names:
            raise ValueError(f"--case: wanted one of {', '.join(CASES)} or a pattern of them; got {pattern!r}")
        chosen.update({name: CASES[name] for name in names})
    return list(chosen.values())
