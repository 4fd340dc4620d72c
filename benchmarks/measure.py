"""Clocks and memory.

Time: implementations take turns (A B C, C B A, ...), so a slow minute of the machine hits them all. On a GPU the
time comes from events, after a write larger than the L2 cache and a pause in which the host can enqueue: it is the
device's work, plus whatever makes the device wait for the host. On a CPU the processor time goes beside the wall
clock: on a busy machine the ratio of processor times is the steadier one.

Memory: on a GPU the allocator's own peak. On a CPU the resident set, sampled every millisecond, in a fresh process
per implementation, because memory that an earlier one freed but the pool kept would hide a later one's need
(`ru_maxrss` differences mislead for the same reason). Outputs and gradients are taken off: all must make those.
"""

from __future__ import annotations

import os
import resource
import statistics
import threading
import time
from collections.abc import Callable

import torch

PAGE = os.sysconf("SC_PAGE_SIZE")
FLUSH_BYTES = 256 << 20  # larger than any L2 cache of today
AHEAD = 10_000_000  # clock cycles of the pause, about 5 ms: else launches hide a residual's few microseconds


class Clock:
    """Times single calls on one device."""

    def __init__(self, device: str):
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES // 4, device=device) if device == "cuda" else None

    def __call__(self, run: Callable[[], object]) -> tuple[float, float, float]:
        """Wall seconds of one call, and processor seconds of all threads in user and system mode (0 on a GPU)."""
        if self.flush is not None:
            self.flush.zero_()
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda.synchronize()
            torch.cuda._sleep(AHEAD)
            start.record()
            made = run()
            stop.record()
            stop.synchronize()
            del made
            return start.elapsed_time(stop) / 1e3, 0.0, 0.0
        used = resource.getrusage(resource.RUSAGE_SELF)
        before = time.perf_counter()
        made = run()
        wall = time.perf_counter() - before
        now = resource.getrusage(resource.RUSAGE_SELF)
        del made
        return wall, now.ru_utime - used.ru_utime, now.ru_stime - used.ru_stime


def take_turns(runs: dict[str, Callable[[], object]], clock: Clock, repeats: int) -> dict[str, dict]:
    """Time every run `repeats` times in alternating order. Returns all repeats and their summary per name."""
    taken: dict[str, list[tuple[float, float, float]]] = {name: [] for name in runs}
    order = list(runs)
    for turn in range(repeats):
        for name in order if turn % 2 == 0 else reversed(order):
            taken[name].append(clock(runs[name]))
    return {name: summary(times, clock.device == "cpu") for name, times in taken.items()}


def summary(taken: list[tuple[float, float, float]], processor: bool) -> dict:
    """Median, range and every repeat; with processor time (page faults of big temporaries are system time) on a CPU."""
    wall, user, system = (list(column) for column in zip(*taken))
    made = {
        "median_s": statistics.median(wall),
        "min_s": min(wall),
        "max_s": max(wall),
        "repeats_s": wall,
    }
    if processor:
        made["cpu_median_s"] = statistics.median(u + s for u, s in zip(user, system))
        made["user_repeats_s"], made["system_repeats_s"] = user, system
    return made


def resident() -> int:
    """Resident set of this process in bytes."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * PAGE
    except FileNotFoundError:
        import psutil

        return psutil.Process().memory_info().rss


class Sampler:
    """Largest resident set while the block ran, read about every millisecond by a thread."""

    def __init__(self, interval: float = 0.001):
        self.interval, self.peak, self.samples = interval, 0, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.peak = max(self.peak, resident())
            self.samples += 1
            self._stop.wait(self.interval)

    def __enter__(self) -> Sampler:
        self.before = resident()
        self.peak = self.before
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.peak = max(self.peak, resident())


def cpu_peak(run: Callable[[], object], returned_bytes: Callable[[object], int]) -> dict:
    """Peak resident set of one call beyond what was there before, with and without what it returned."""
    with Sampler() as sampler:
        made = run()
    returned = returned_bytes(made)
    above = sampler.peak - sampler.before
    return {"above_inputs": above, "returned": returned, "extra": max(0, above - returned), "samples": sampler.samples}


def cuda_peak(run: Callable[[], object], returned_bytes: Callable[[object], int]) -> dict:
    """The same from the CUDA allocator's counters."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    made = run()
    torch.cuda.synchronize()
    above = torch.cuda.max_memory_allocated() - before
    returned = returned_bytes(made)
    return {"above_inputs": above, "returned": returned, "extra": max(0, above - returned)}
