"""How the learning rate of log Z carries over to other widths: python -m benchmarks.log_z_width (seconds on a CPU).

Synthetic pooled states (a common direction, ten loud dimensions, Gaussian rest), synthetic targets that rise from 0
to 1 as a policy's accuracy does, AdamW at 1e-2 as configs/sums.toml has it. Nothing here comes from a language model.
"""

from __future__ import annotations

import torch

from flowrl_kernels.nn import LogPartition

WIDTHS = (64, 576, 2048, 4096)
STEPS, PROMPTS, SEEDS, LR = 60, 16, 1, 1e-2


def states(width: int, size: float, generator: torch.Generator) -> torch.Tensor:
    """[256, H] of root mean square about `size`."""
    common = torch.randn(width, generator=generator)
    x = common + 0.5 * torch.randn(256, width, generator=generator)
    loud = torch.randperm(width, generator=generator)[:10]
    x[:, loud] *= 5.0
    return x * (size / x.square().mean().sqrt())


def run(width: int, size: float, *, normalize: bool, rate: float, seed: int = 0) -> tuple[float, float]:
    """(largest |log Z| on the way, mean error of the last 20 steps); the target's noise has a spread of .3."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    pool = states(width, size, generator)
    net = LogPartition(width, normalize=normalize)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.0)
    largest, errors = 0.0, []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 11)
        x = pool[torch.randint(256, (PROMPTS,), generator=generator)]
        z = net(x, cu_seqlens=torch.arange(PROMPTS + 1))
        goal = torch.full((PROMPTS,), min(1.0, step / 40))
        seen = goal + 0.3 * torch.randn(PROMPTS, generator=generator)
        optimizer.zero_grad()
        (z - seen).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        largest = max(largest, float(z.detach().abs().max()))
        if step >= STEPS - 20:
            errors.append(float((z.detach() - goal).abs().mean()))
    return largest, sum(errors) / len(errors)


def main() -> None:
    print("largest |log Z| in 60 steps / mean error of the last 20; the target ends at 1")
    for size in (1.0, 8.0):
        for name, normalize, power in (
            ("as in the paper", False, 0.0),
            ("rate * 64/H", False, 1.0),
            ("normalised", True, 0.0),
            ("normalised, rate * (64/H)^1/2", True, 0.5),
            ("normalised, rate * 64/H", True, 1.0),
        ):
            cells = []
            for width in WIDTHS:
                got = [
                    run(width, size, normalize=normalize, rate=LR * (64 / width) ** power, seed=s) for s in range(SEEDS)
                ]
                cells.append(" / ".join(f"{sum(column) / SEEDS:.2f}" for column in zip(*got)))
            print(f"| states of size {size:g}, {name} | {' | '.join(cells)} |", flush=True)
    print("widths: " + ", ".join(map(str, WIDTHS)))


if __name__ == "__main__":
    main()
