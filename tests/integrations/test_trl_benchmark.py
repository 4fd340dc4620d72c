"""The benchmark that sets TRL's head beside ours times the same log-probs, and really exchanges the head."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="TRL is not installed here: `make test-integrations` has it")
sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from trl.trainer import utils as trl_utils

import flowrl_kernels.integrations.trl  # noqa: F401  before the patch below: it looks at the function's signature
from benchmarks import end_to_end


def test_the_four_heads_compute_the_same_and_only_trl_s_own_calls_trl_s_function(monkeypatch):
    monkeypatch.setattr(end_to_end, "SMALL", end_to_end.SMALL | {"num_hidden_layers": 1, "vocab_size": 97})
    monkeypatch.setitem(end_to_end.TOKENS, "cpu", (2, 8))
    asked = []
    theirs = trl_utils._ChunkedLogProbFunction.forward

    def forward(*args):
        asked.append(head)
        return theirs(*args)

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "forward", staticmethod(forward))
    truth = end_to_end.exact("cpu", 0)
    assert end_to_end.usable() == ["eager", "ours", "trl", "trl-patched"]
    losses = {}
    for head in end_to_end.HEADS:
        step, tokens = end_to_end.prepare(head, "cpu", 0)
        errors = []
        losses[head] = step(errors, truth).item()
        assert errors[0] < 1e-5
        assert tokens == 16
    assert asked == ["trl"]
    assert torch.tensor(list(losses.values())).std() < 1e-4 * abs(losses["eager"])
