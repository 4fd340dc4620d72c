"""One batch through a residual launcher, padded or packed, and two results side by side."""

import torch

from flowrl_kernels.chunked import residual as plain
from flowrl_kernels.core.segments import Segments
from flowrl_kernels.core.types import Anchors, Sequences
from flowrl_kernels.testing import assert_grad_close, cu_seqlens_of

NAMES = ("loss", "residual", "weight", "metrics", "dlogp", "dlog_z")


def pack(data):
    """The batch as [N] with cu_seqlens; the padding behind each sequence goes, its holes stay."""
    mask = data["mask"]
    lengths = torch.where(mask.any(1), mask.shape[1] - mask.flip(1).int().argmax(1), 0)
    inside = torch.arange(mask.shape[1], device=mask.device) < lengths[:, None]
    return (
        {k: v[inside] if v.shape == mask.shape else v for k, v in data.items()},
        cu_seqlens_of(lengths).long(),
        inside,
    )


def run(launcher, row, data, cu_seqlens=None, normalizer=None):
    """The launcher's results by name; the plain torch one gets its numbers in float64."""
    data = {k: v.double() if launcher is plain and v.is_floating_point() else v for k, v in data.items()}
    anchor = {"ref": data["ref"], "old": data["old"], None: None}[row.anchor]
    log_z = data["log_z"] if row.log_z == "learned" else None
    divisor = None if normalizer is None else torch.tensor(normalizer, dtype=torch.float64)
    out = launcher.residual_fwd(
        row, data["logp"], Anchors(anchor, data["old"], data["sampler"]),
        Sequences(data["reward"], log_z, data["groups"], divisor), Segments(data["mask"], cu_seqlens),
    )  # fmt: skip
    return dict(zip(NAMES, out))


def agree(got, want, tolerance=2e-6):
    for name in ("loss", "residual", "weight", "metrics"):
        torch.testing.assert_close(got[name].double(), want[name], rtol=tolerance, atol=tolerance, equal_nan=True)
    for name in ("dlogp", "dlog_z"):
        if want[name].norm() > 0:
            assert_grad_close(got[name], want[name], rel=tolerance)
        else:
            assert not got[name].any()
