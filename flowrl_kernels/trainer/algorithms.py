"""The algorithms, one row each: what sets it apart from the others, and where it comes from.

A new one is a row here, its name in `config.AlgorithmName`, and a case in tests/trainer/test_golden_steps.py worked
out from its paper (docs/trainer.md). Everything else (what is scored before an update, which settings a run may give,
whether a group of one makes sense) follows from the row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from flowrl_kernels.trainer.config import Config

# What becomes of a response's reward r among those of its group
Reward = Literal[
    "zscore",  # (r - mean) / deviation
    "centred",  # r - mean
    "left out",  # r - mean of the others
    "by length",  # r - mean weighted by the responses' lengths
    "raw",  # r
    "good",  # max(r, 0); responses at 0 stay out of the loss
    "configured",  # zscore, centred or raw, as `algorithm.reward` says
]
# What of it each token gets; the last two are whitened over all tokens of the step
Tokens = Literal[
    "all",  # all of it
    "returns",  # what is still to come, discounted
    "gae",  # the same beside a critic's values
]
# What an advantage is multiplied by
Ratio = Literal[
    "token",  # pi / pi_old
    "sequence",  # its geometric mean over the response
    "detached",  # pi / pi_old as a weight of log pi, without a gradient
    "none",  # log pi
    "preset",  # no advantage: a squared residual, whose row `algorithm.preset` names and which sets the rest
]
Aggregate = Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
Clip = tuple[float | None, float | None]  # of the ratio; None: open on that side

UNCLIPPED: Clip = (None, None)


@dataclass(frozen=True)
class Algorithm:
    """One row."""

    source: str  # the paper, by its number on arXiv
    reward: Reward
    ratio: Ratio
    clip: Clip
    aggregate: Aggregate | None  # how tokens become a scalar; None: the preset's
    tokens: Tokens = "all"
    kl: Literal["loss", "return", "none"] = "loss"  # where `algorithm.kl` is paid
    mixed: bool = False  # groups whose rewards are all equal are left out

    @property
    def residual(self) -> bool:
        """Whether it minimises a squared residual, towards a target distribution; else it follows an advantage."""
        return self.ratio == "preset"

    @property
    def critic(self) -> bool:
        return self.tokens == "gae"

    @property
    def compares(self) -> bool:
        """Whether a response is judged beside those of its group, so that a group of one gives no gradient."""
        return self.mixed or self.reward in ("zscore", "centred", "left out", "by length")

    @property
    def reads(self) -> frozenset[str]:
        """The fields of [algorithm] among `OWN` that it uses."""
        if self.residual:
            return frozenset()
        out = {"entropy", *(["kl"] if self.kl != "none" else [])}
        out |= {"dual_clip"} if self.ratio in ("token", "sequence") else set()
        out |= {"gamma"} if self.tokens != "all" else set()
        out |= {"gae_lambda", "value_clip"} if self.critic else set()
        return frozenset(out)


# fields of [algorithm] that some algorithms read and others would ignore -> their defaults
OWN = {"kl": 0.0, "entropy": 0.0, "dual_clip": 0.0, "gamma": 1.0, "gae_lambda": 1.0, "value_clip": 0.2}

# fmt: off
ALGORITHMS: dict[str, Algorithm] = {
    # name                     arXiv         reward        ratio       clip                  aggregate, and the rest
    "flowrl":        Algorithm("2509.15207", "configured", "preset",   UNCLIPPED,            None, kl="none"),
    "grpo":          Algorithm("2402.03300", "zscore",     "token",    (0.8, 1.2),           "seq-mean-token-mean"),
    "dapo":          Algorithm("2503.14476", "zscore",     "token",    (0.8, 1.28),          "token-mean", mixed=True),
    "dr_grpo":       Algorithm("2503.20783", "centred",    "token",    (0.8, 1.2),           "seq-mean-token-sum-norm"),
    "gspo":          Algorithm("2507.18071", "zscore",     "sequence", (1 - 3e-4, 1 + 4e-4), "seq-mean-token-mean"),
    "cispo":         Algorithm("2506.13585", "zscore",     "detached", (None, 1.28),         "token-mean"),
    "ppo":           Algorithm("1707.06347", "raw",        "token",    (0.8, 1.2),           "token-mean", "gae"),
    "reinforce_pp":  Algorithm("2501.03262", "raw",        "token",    (0.8, 1.2),           "token-mean", "returns",
                               kl="return"),
    "reinforce_pp_baseline":
                     Algorithm("2501.03262", "centred",    "token",    (0.8, 1.2),           "token-mean", "returns"),
    "rloo":          Algorithm("2402.14740", "left out",   "none",     UNCLIPPED,            "seq-mean-token-sum"),
    "opo":           Algorithm("2505.23585", "by length",  "none",     UNCLIPPED,            "seq-mean-token-sum"),
    "raft":          Algorithm("2304.06767", "good",       "none",     UNCLIPPED,            "token-mean"),
    "reinforce_rej": Algorithm("2504.11343", "raw",        "token",    (0.8, 1.2),           "token-mean", mixed=True),
}
# fmt: on


def of(config: Config) -> Algorithm:
    """The configured row."""
    return ALGORITHMS[config.algorithm.name]
