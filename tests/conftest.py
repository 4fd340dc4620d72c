"""Small machines first: one thread per process, so that results do not depend on how many workers share the cores."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    monkeypatch.delenv("FLOWRL_IMPL", raising=False)
    monkeypatch.delenv("FLOWRL_CHECK", raising=False)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="no CUDA or ROCm device: what this test proves is unproved here")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)
