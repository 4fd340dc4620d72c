"""Small machines first: one thread per process, so that results do not depend on how many workers share the cores."""

import poison as poisons
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("FLOWRL_IMPL", raising=False)
    monkeypatch.delenv("FLOWRL_CHECK", raising=False)


@pytest.fixture(params=list(poisons.VALUES))
def poison(request):
    """poison(tensor, mask): a copy with junk in every slot that does not count (tests/poison.py)."""
    return poisons.poison(poisons.VALUES[request.param])


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA or ROCm device: what this test proves is unproved here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
