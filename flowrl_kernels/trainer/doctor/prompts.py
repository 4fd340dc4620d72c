"""Other ways to write the same prompts, which an engine that takes text may have written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]


def rewritten(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str | Messages], ids: Sequence[Sequence[int]], system: str = ""
) -> dict[str, list[list[int]]]:
    """{name: every prompt written so}, without those that a tokenizer refuses or that change nothing.

    Args:
        texts: of the problems, a text or chat messages. ids: as the trainer writes them. system: its message.
    """
    bos = tokenizer.bos_token_id

    def messages(text: str | Messages, alone: bool = False) -> Messages:
        out = [{"role": "user", "content": text}] if isinstance(text, str) else list(text)
        return out if alone or not system else [{"role": "system", "content": system}, *out]

    def plain(text: str | Messages) -> str:
        return text if isinstance(text, str) else "\n".join(m["content"] for m in text)

    def template(text: str | Messages, alone: bool = False, prompt: bool = True) -> list[int]:
        made = tokenizer.apply_chat_template(messages(text, alone), tokenize=False, add_generation_prompt=prompt)
        return tokenizer(made, add_special_tokens=False)["input_ids"]

    def chatml(text: str | Messages) -> list[int]:
        parts = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages(text)]
        return tokenizer("".join(parts) + "<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]

    ways: dict[str, Callable[[int], list[int]]] = {
        "in the tokenizer's chat template": lambda i: template(texts[i]),
        "without the chat template": lambda i: tokenizer(plain(texts[i]), add_special_tokens=False)["input_ids"],
        "without the generation prompt": lambda i: template(texts[i], prompt=False),
        "without the system message": lambda i: template(texts[i], alone=True),
        "in ChatML": lambda i: chatml(texts[i]),
    }
    if bos is not None:
        ways |= {f"{name}, BOS in front": partial(_after, bos, way) for name, way in ways.items()}
        ways["with one more BOS"] = lambda i: [bos, *ids[i]]
        ways["without BOS"] = lambda i: [t for j, t in enumerate(ids[i]) if j or t != bos]
    ways["without the chat template, special tokens added"] = lambda i: tokenizer(plain(texts[i]))["input_ids"]
    out: dict[str, list[list[int]]] = {}
    for name, way in ways.items():
        try:
            written = [way(i) for i in range(len(ids))]
        except Exception:  # a template that is missing or refuses: not a way that an engine can have taken
            continue
        if all(written) and written != [list(row) for row in ids] and written not in out.values():
            out[name] = written
    return out


def _after(bos: int, way: Callable[[int], list[int]], i: int) -> list[int]:
    return [bos, *way(i)]
