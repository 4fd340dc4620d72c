"""What a sequence leaves behind for the loss and the metrics, and the kernel that adds it up.

Summed in float64 and in a fixed order, by one program: lane i takes sequences i, i + LANES, ...
"""

from __future__ import annotations

import triton
import triton.language as tl

# what a sequence leaves behind, rows of `record` [FIELDS, B] float64
COUNT = tl.constexpr(0)
RESIDUAL = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
LOG_RATIO = tl.constexpr(3)
LOW = tl.constexpr(4)
HIGH = tl.constexpr(5)
LOG_Z = tl.constexpr(6)
TO_REF = tl.constexpr(7)
LOSS = tl.constexpr(8)
SURROGATE = tl.constexpr(9)
RAW = tl.constexpr(10)  # the residual before its group's mean is taken off; at token level the weight of the sequence
OPEN = tl.constexpr(11)  # 1 where the gate lets the gradient through
STEP = tl.constexpr(12)  # sum of the tokens' weighted slopes (token level)
FIELDS = 13


@triton.jit
def field_sum(record, field, num, LANES: tl.constexpr):
    """Sum of a field over the sequences."""
    total = tl.zeros((LANES,), tl.float64)
    for first in range(0, num, LANES):
        i = first + tl.arange(0, LANES)
        total += tl.load(record + field * num + i, mask=i < num, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def field_mean(record, field, num, used, LANES: tl.constexpr):
    return field_sum(record, field, num, LANES) / used


@triton.jit(do_not_specialize=["num"])
def total_kernel(
    record,
    divisor,
    loss,  # []
    metrics,  # [12], in the order of reference.residual.METRICS
    num,
    TOKEN: tl.constexpr,
    LANES: tl.constexpr,
):
    """Loss and metrics over the sequences that have tokens, by one program."""
    some = tl.zeros((LANES,), tl.float64)
    sizes = tl.zeros((LANES,), tl.float64)
    largest = tl.full((LANES,), float("-inf"), tl.float64)
    smallest_weight = tl.full((LANES,), float("inf"), tl.float64)
    largest_weight = tl.full((LANES,), float("-inf"), tl.float64)
    strange = tl.zeros((LANES,), tl.float64)  # records that are not finite
    undefined = tl.zeros((LANES,), tl.float64)  # residuals that are NaN
    undefined_weight = tl.zeros((LANES,), tl.float64)
    for first in range(0, num, LANES):
        i = first + tl.arange(0, LANES)
        on = tl.load(record + COUNT * num + i, mask=i < num, other=0.0) > 0.0
        size = tl.abs(tl.load(record + RESIDUAL * num + i, mask=on, other=0.0))
        weight = tl.load(record + WEIGHT * num + i, mask=on, other=0.0)
        log_ratio = tl.load(record + LOG_RATIO * num + i, mask=on, other=0.0)
        some += tl.where(on, 1.0, 0.0)
        sizes += size
        largest = tl.where(on & (size > largest), size, largest)
        largest_weight = tl.where(on & (weight > largest_weight), weight, largest_weight)
        smallest_weight = tl.where(on & (weight < smallest_weight), weight, smallest_weight)
        finite = (size < float("inf")) & (tl.abs(weight) < float("inf")) & (tl.abs(log_ratio) < float("inf"))
        strange += tl.where(finite, 0.0, 1.0)
        undefined += tl.where(size != size, 1.0, 0.0)
        undefined_weight += tl.where(weight != weight, 1.0, 0.0)
    count = tl.sum(some, 0)
    used = tl.maximum(count, 1.0)
    # a maximum passes over NaN; a log must not
    poison = tl.where(tl.sum(undefined, 0) > 0.0, float("nan"), 0.0)
    poison_weight = tl.where(tl.sum(undefined_weight, 0) > 0.0, float("nan"), 0.0)
    log_z_mean = field_mean(record, LOG_Z, num, used, LANES)
    square = tl.zeros((LANES,), tl.float64)
    for first in range(0, num, LANES):
        i = first + tl.arange(0, LANES)
        on = tl.load(record + COUNT * num + i, mask=i < num, other=0.0) > 0.0
        away = tl.load(record + LOG_Z * num + i, mask=on, other=0.0) - log_z_mean
        square += tl.where(on, away * away, 0.0)
    out = metrics.dtype.element_ty
    tl.store(metrics + 0, (tl.sum(sizes, 0) / used).to(out))
    tl.store(metrics + 1, (tl.where(count > 0.0, tl.max(largest, 0), 0.0) + poison).to(out))
    tl.store(metrics + 2, field_mean(record, WEIGHT, num, used, LANES).to(out))
    tl.store(metrics + 3, (tl.where(count > 0.0, tl.min(smallest_weight, 0), 0.0) + poison_weight).to(out))
    tl.store(metrics + 4, (tl.where(count > 0.0, tl.max(largest_weight, 0), 0.0) + poison_weight).to(out))
    tl.store(metrics + 5, field_mean(record, LOW, num, used, LANES).to(out))
    tl.store(metrics + 6, field_mean(record, HIGH, num, used, LANES).to(out))
    tl.store(metrics + 7, field_mean(record, LOG_RATIO, num, used, LANES).to(out))
    tl.store(metrics + 8, field_mean(record, TO_REF, num, used, LANES).to(out))
    tl.store(metrics + 9, log_z_mean.to(out))
    tl.store(metrics + 10, tl.sqrt(tl.sum(square, 0) / used).to(out))
    if divisor is not None:
        total = tl.load(divisor)
        total = tl.where((total == 0.0) & (count == 0.0), 1.0, total)  # 0 over 0 is 0
    elif TOKEN:
        total = tl.maximum(field_sum(record, COUNT, num, LANES), 1.0)
    else:
        total = num.to(tl.float64)
    value = field_sum(record, LOSS, num, LANES) / total + field_sum(record, SURROGATE, num, LANES)
    value = value.to(loss.dtype.element_ty)
    tl.store(loss, value)
    least = tl.where(tl.abs(value) < float("inf"), 0.0, 1.0)  # a loss that overflows is counted
    tl.store(metrics + 11, tl.maximum(tl.sum(strange, 0), least).to(out))
