"""A tiny Qwen2 with a tokenizer on disk, as a user's model path: TRL loads the reference from it."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "examples"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """Path of the examples' 2-layer Qwen2 (V = 16, H = 32) and its tokenizer."""
    pytest.importorskip("transformers")
    from common import save_tiny

    return save_tiny(str(tmp_path_factory.mktemp("tiny") / "qwen2"))
