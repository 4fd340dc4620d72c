"""What reading could not settle about this GPU's torch and triton: `python -m benchmarks.doubts --out FILE`.

- torch.addmm with 16-bit factors, an fp32 sum and `out=` the sum itself: every accumulated gradient goes through it.
- Whether the kernels, as this triton compiles them, have tiles and the steps of their products in one loop (it may
  ignore the request in silence), multiply asynchronously and spill nothing; and whether the bits are those of two.

Run before anything else: a no here explains what fails or is slow later. Exit 1 if something is wrong, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch


def sums_in_place(device: str) -> dict:
    """fp32 += 16-bit product, in place, against float64."""
    from flowrl_kernels.triton.matmul import matmul_into

    made = {}
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        a, b = (torch.randn(*s, device=device, dtype=dtype) for s in ((96, 256), (256, 160)))
        begin = torch.randn(96, 160, device=device)
        out = begin.clone()
        matmul_into(out, a, b, add=True)
        exact = begin.double() + a.double() @ b.double()
        made[str(dtype).removeprefix("torch.")] = ((out - exact).norm() / exact.norm()).item()
    return {"relative_error": made, "right": all(error < 1e-5 for error in made.values())}


def _launched(run: Callable[[], object]) -> tuple[list, object]:
    """(name, compiled kernel) of every launch inside, and what was returned."""
    from triton.runtime.jit import JITFunction

    found, original = [], JITFunction.run

    def spy(self, *args, **kwargs):
        kernel = original(self, *args, **kwargs)
        found.append((self.fn.__name__, kernel))
        return kernel

    with mock.patch.object(JITFunction, "run", spy):
        made = run()
    return found, made


def one_loop(device: str, n: int = 1024, h: int = 1024, v: int = 12800) -> dict:
    """The forward and the logits of the backward: what they were compiled to, and their bits in one loop and in two."""
    from flowrl_kernels.core.types import Head, Needs, Upstream
    from flowrl_kernels.triton import linear_logprob as room
    from flowrl_kernels.triton import tiles
    from tests import machine_code

    torch.manual_seed(0)
    hidden = torch.randn(n, h, device=device, dtype=torch.bfloat16)
    weight = torch.randn(v, h, device=device, dtype=torch.bfloat16) * h**-0.5
    target, grad = torch.randint(0, v, (n,), device=device), torch.randn(n, device=device)
    head = Head(weight, None, torch.ones(1, device=device))
    outcomes, kernels, tile_for = {}, {}, tiles.tile_for

    def step() -> list[torch.Tensor]:
        saved = room.linear_logprob_fwd(hidden, target, head, True, True)
        grads = room.linear_logprob_bwd(Upstream(grad), hidden, target, head, saved, Needs(True, True, False))
        return [*saved[:4], *(g for g in grads if g is not None)]

    def changed(flatten: bool) -> Callable[..., tiles.Tile]:
        return lambda *given: tile_for(*given)._replace(flatten=flatten)

    for flatten in (True, False):
        with mock.patch.object(tiles, "tile_for", changed(flatten)):
            launched, outcomes[flatten] = _launched(step)
        kernels[flatten] = {name: kernel for name, kernel in launched if name in ("forward_kernel", "dlogits_kernel")}
    logits = hidden.double() @ weight.double().T
    exact = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
    made: dict = {
        "same_bits": all(torch.equal(a, b) for a, b in zip(outcomes[True], outcomes[False])),
        "logp_error": (outcomes[True][0] - exact).abs().max().item(),
    }
    right = made["same_bits"] and made["logp_error"] < 1e-3
    if tiles.arch_of(hidden.device) == "sm_90":
        for name, kernel in kernels[True].items():
            work = machine_code.work(kernel.asm["cubin"])
            made[name] = {**work._asdict(), "spills": kernel.n_spills, "registers": kernel.n_regs}
            right &= work.flattened and work.in_flight > 0 and kernel.n_spills == 0
    else:
        made["machine_code"] = "read on sm_90 alone"
    return {**made, "right": right}


DOUBTS = {"sums in place": sums_in_place, "one loop": one_loop}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("python -m benchmarks.doubts", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("no GPU: NOT PROVED: what reading could not settle about its torch and triton")
        return 2
    made: dict = {"kind": "doubts", "gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name, ask in DOUBTS.items():
        try:
            made[name] = ask("cuda")
        except Exception as error:  # the others are asked too
            made[name] = {"right": False, "error": f"{type(error).__name__}: {str(error)[:500]}"}
        print(f"{name}: {'right' if made[name]['right'] else 'WRONG'}: {made[name]}")
        given.out.write_text(json.dumps(made, indent=1) + "\n")
    return 0 if all(made[name]["right"] for name in DOUBTS) else 1


if __name__ == "__main__":
    raise SystemExit(main())
