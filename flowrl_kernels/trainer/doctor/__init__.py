"""Where a gap between the sampler's log-probabilities and the trainer's comes from: one part swapped at a time."""

from flowrl_kernels.trainer.doctor.case import Case, Setting, collect
from flowrl_kernels.trainer.doctor.examine import Diagnosis, examine

__all__ = ["Case", "Diagnosis", "Setting", "collect", "examine"]
