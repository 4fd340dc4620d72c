"""What a fuzzed call is made of, and how it is judged."""

import re
import signal

import numpy as np
import torch
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
IDS = (torch.int64, torch.int32, torch.int16, torch.uint8)
SPECIAL = (float("nan"), float("inf"), float("-inf"), 1e38, -1e38)
SECONDS = 60  # longer is a hang


class Draw:
    """Named draws from hypothesis; bulk numbers come from a drawn seed."""

    def __init__(self, data):
        self.data = data
        self.told = None  # the arguments, for the report of a failure
        self.make = torch.Generator().manual_seed(self.int(0, 999))

    def int(self, low, high):
        return self.data.draw(st.integers(low, high))

    def of(self, *options):
        return options[self.int(0, len(options) - 1)]

    def chance(self, percent):
        return self.int(0, 99) >= 100 - percent  # shrinks to False

    def text(self):
        return self.data.draw(st.text(max_size=12))

    def normal(self, shape, dtype=torch.float32, scale=1.0, shift=0.0):
        value = torch.randn(shape, generator=self.make, dtype=torch.float64) * scale + shift
        return self.laid(value.to(dtype))

    def ids(self, shape, high, dtype=torch.int64):
        return self.laid(torch.randint(max(1, high), tuple(shape), generator=self.make).to(dtype))

    def laid(self, value, same=False):
        """Another layout, of the same numbers or (one time in five) of the first row's alone."""
        how = self.int(0, 2 if same else 4)
        if how == 1 and value.dim():
            wide = value.new_zeros((*value.shape[:-1], 2 * value.shape[-1]))
            wide[..., ::2] = value
            return wide[..., ::2]
        if how == 2 and value.dim() > 1:
            return value.transpose(0, -1).contiguous().transpose(0, -1)
        if how == 3 and value.dim() and value.shape[0] and value.is_floating_point():
            return value[:1].expand(value.shape)  # every entry of the first axis the same memory
        return value

    def spice(self, value, percent=15, options=SPECIAL):
        """Now and then one entry that is no ordinary number."""
        if value is None or not value.numel() or not self.chance(percent):
            return value
        value = value.clone(memory_format=torch.contiguous_format)
        value.view(-1)[self.int(0, value.numel() - 1)] = self.of(*options)
        return value

    def junk(self, value, counts):
        """Anything at all where nothing counts."""
        if value is None or not self.chance(40):
            return value
        value, unused = value.clone(), ~counts
        new = self.of(*SPECIAL) if value.is_floating_point() else self.int(0, 120)
        value[unused] = torch.tensor(new, dtype=torch.float64).to(value.dtype)  # newer torch fills no float16 with 1e38
        return value

    def wrong(self):
        """What is no tensor, or no tensor of numbers that could be meant."""
        return self.of(
            None, "text", 3, 2.5, [1.0], (1.0, 2.0), np.float32(1.0), np.ones(3), True, {}, torch.nn.Linear(1, 1),
            torch.ones(2, dtype=torch.complex64), torch.tensor(1.0), torch.ones(3, dtype=torch.bool),
            torch.ones(2, 3, 4, 5),
        )  # fmt: skip

    def odd_number(self):
        """What is no number that a setting could be."""
        return self.of("text", [1.0], None, float("nan"), float("inf"), -1.0, 0, np.float32(0.5), np.int64(2), True, {},
                       torch.tensor(0.5), 1e39, -0.0)  # fmt: skip


class Hang(Exception):
    pass


class Unnamed(Exception):
    """Refused, by the right type, without a word about which argument."""


def describe(told):
    """The arguments of a call, short enough to read and to type again."""
    if not isinstance(told, dict):
        return str(told)
    lines = []
    for name, value in told.items():
        if isinstance(value, torch.Tensor):
            numbers = value.detach().tolist() if value.numel() <= 24 and not value.is_sparse else "..."
            value = f"{str(value.dtype)[6:]} {tuple(value.shape)} strides {value.stride()} = {numbers}"
        lines.append(f"  {name} = {value!r}" if not isinstance(value, str) else f"  {name} = {value}")
    return "\n".join(lines)


def attempt(call, names):
    """call(), or None where it was refused: by TypeError or ValueError, with an argument's name in front."""

    def late(*_):
        raise Hang(f"no answer within {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        return call()
    except (TypeError, ValueError) as error:
        said = str(error)
        if any(re.match(rf"(.*\W)?{re.escape(name)}(\W|$)", said.split(": ")[0]) for name in names):
            return None
        raise Unnamed(f"{type(error).__name__}: {said[:300]}") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def finite(*tensors):
    return all(t is None or bool(t.isfinite().all()) for t in tensors)


def close(name, got, want, rel, floor=1e-6):
    """Elementwise against the largest number of `want`; what overflows the narrower type is inf there."""
    assert got is not None, f"{name}: None where a number was wanted"
    assert got.shape == want.shape, f"{name}: shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    if not want.numel():
        return
    assert not got.isnan().any(), f"{name}: NaN from finite input"
    largest = torch.finfo(got.dtype).max
    inside = want.abs() < 0.99 * largest
    over = want.abs() > 1.01 * largest
    assert got[over].isinf().all(), f"{name}: finite where the true value has no place in {got.dtype}"
    if inside.any():
        size = want[inside].abs().max()
        error = (got.double() - want)[inside].abs().max()
        tiny = float(torch.finfo(got.dtype).tiny)
        assert error <= rel * size + floor + tiny, f"{name}: off by {float(error):.3e}, largest {float(size):.3e}"


BUDGET = {torch.float32: 2e-4, torch.float64: 1e-9, torch.bfloat16: 2e-2, torch.float16: 4e-3}
OUT = {torch.float64: 1e-9, torch.float32: 2e-5}


def corrupt(d, arguments, optional=()):
    """Now and then one argument is something else altogether; True where that cannot be meant."""
    d.told = arguments
    if not d.chance(25):
        return False
    name = d.of(*arguments)
    value = arguments[name]
    wrong = d.wrong() if isinstance(value, torch.Tensor) else d.odd_number()
    arguments[name] = wrong
    if not isinstance(value, torch.Tensor):
        return isinstance(wrong, str | list | dict)
    if wrong is None:
        return name not in (*optional, "normalizer")
    if name in ("normalizer", "temperature"):  # numbers as well as tensors
        return isinstance(wrong, str | list | dict | torch.nn.Module)
    return not isinstance(wrong, torch.Tensor)


def outcome(out, nonsense):
    if out is None:
        return "refused"
    assert not nonsense, "took what cannot be meant"
    return "agreed"
