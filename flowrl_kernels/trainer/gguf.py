"""A GGUF file, as llama.cpp ships models, made into a folder that transformers and this trainer load.

The weights come out as the file holds them, de-quantized to float32: a file of four bits makes a model of four bits'
worth of precision. https://huggingface.co/docs/transformers/gguf
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any


def convert(source: Path, folder: Path, end: str | None = None) -> Path:
    """Writes `folder` with model, tokenizer, chat template and end token; returns it.

    Args:
        source: the .gguf file.
        folder: must not exist yet.
        end: token that ends a response, as text. None: the one that the file names.

    Raises:
        FileNotFoundError: no such file.
        FileExistsError: there is something at `folder`.
        ValueError: not a GGUF file that transformers reads, a needed package is missing, `end` is not a token, or the
            chat template does not end a message with it: such a model never learns to stop.
    """
    source, folder = Path(source).expanduser(), Path(folder).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"source: no such file: {source}")
    if folder.exists():
        raise FileExistsError(f"folder: {folder} exists; remove it or name another")
    model, tokenizer = _read(source)
    number = model.config.eos_token_id if end is None else tokenizer.get_vocab().get(end)
    if number is None:
        raise ValueError(f"end: {end!r} is not a token of {source.name}")
    end = tokenizer.convert_ids_to_tokens(number)
    if tokenizer.chat_template and not _ends_with(tokenizer, end):
        raise ValueError(f"end: the chat template of {source.name} does not end a message with {end!r}; name its token")
    tokenizer.eos_token = tokenizer.pad_token = end
    tokenizer.clean_up_tokenization_spaces = False  # it would drop spaces of a byte-level vocabulary
    model = _plain(model)
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.pad_token_id = number
    partial = folder.with_name(folder.name + ".incomplete")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)
    return folder


def _read(source: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(**place)
        model: Any = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    except ImportError as error:
        raise ValueError(f"source: reading GGUF needs pip install 'flowrl-kernels[smol]': {error}") from error
    except Exception as error:  # the readers' own, of many kinds
        raise ValueError(f"source: {source} cannot be read: {error}") from error
    return model, tokenizer


def _ends_with(tokenizer: Any, end: str) -> bool:
    """Whether a message in the chat template is followed by `end`."""
    mark = "a message"
    text = tokenizer.apply_chat_template([{"role": "user", "content": mark}], tokenize=False)
    return text.rpartition(mark)[2].lstrip().startswith(end)


def _plain(model: Any) -> Any:
    """The same weights in a model that does not take itself for a quantized one, and has no name of its own."""
    import torch

    shape = model.config
    for name in ("quantization_config", "_model_name_or_path"):
        if hasattr(shape, name):
            delattr(shape, name)
    with torch.device("meta"):
        plain = type(model)(shape)
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
