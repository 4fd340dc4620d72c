"""Sums from a start that knows some arithmetic: half of what it is shown are right answers, the rest random ones.

From the task's own start, which knows the format alone, nothing moves for a thousand steps.
"""

import numpy as np

from flowrl_kernels.trainer.tasks.sums import Sums


class WarmSums(Sums):
    def warm_start(self, rng: np.random.Generator, n: int):
        pairs = super().warm_start(rng, n)
        return [
            (problem, rng.choice(self.solutions(problem)) if i % 2 else answer)
            for i, (problem, answer) in enumerate(pairs)
        ]


def task(cfg):
    return WarmSums()
