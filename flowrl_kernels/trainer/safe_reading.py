"""Reading a distributed checkpoint without running what it says: PyTorch's own reader unpickles anything."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import ReadItem

_METADATA = "torch.distributed.checkpoint.metadata"
# the classes that a checkpoint's table of contents is made of, in torch 2.11 to 2.15
ALLOWED = {
    *((_METADATA, name) for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),
    ("collections", "OrderedDict"),
}  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in ALLOWED or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of this trainer holds")


def read_metadata(path: Path) -> Metadata:
    """The table of contents of a checkpoint folder.

    Raises:
        ValueError: it is damaged, or names a class, or a file outside the folder, that no checkpoint of ours does.
    """
    try:
        with (path / ".metadata").open("rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}")
        for info in (metadata.storage_data or {}).values():
            if Path(info.relative_path).name != info.relative_path:
                raise pickle.UnpicklingError(f"it points out of its folder, at {info.relative_path!r}")
    except FileNotFoundError:
        raise ValueError(f"{path / '.metadata'} is missing") from None
    except OSError:
        raise
    except Exception as error:  # a torn pickle raises nearly anything
        raise ValueError(f"{path / '.metadata'} was refused: {error}") from None
    return metadata


def load_plain(file: Any) -> Any:
    """What `torch.save` wrote, if it is tensors and plain data. Raises ValueError for anything else."""
    try:
        return torch.load(file, weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        said = str(error).partition("WeightsUnpickler error: ")[2].partition(" was not")[0]
        raise ValueError(f"it is damaged, or holds more than tensors and plain data {said}".rstrip()) from None


class Reader(FileSystemReader):
    """PyTorch's reader, with only the classes of a table of contents unpickled."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Planner(DefaultLoadPlanner):
    """PyTorch's planner, with values that are no tensors (an optimiser's rates, say) read as plain data."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        plain = io.BytesIO()
        torch.save(load_plain(value), plain)
        plain.seek(0)
        super().load_bytes(read_item, plain)
