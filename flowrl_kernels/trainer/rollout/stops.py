"""Texts that end a response, found in what its tokens decode to: the same token for every engine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROOM = 16  # tokens beside those of the text itself: parts of a character, special ones that no text shows


class Stops:
    """A response ends with the first token up to which its text holds one of `strings`.

    tokens: ids that do so on their own, whatever came before: those whose text holds one of the strings, and the
    special tokens among the strings themselves. window: so many last tokens are enough to see whether the last one
    completes a string.

    Raises:
        ValueError: an empty string, or one with a special token in it that decoding leaves out.
    """

    def __init__(
        self,
        strings: Iterable[str],
        decode: Callable[[list[list[int]]], list[str]],
        tokenizer: PreTrainedTokenizerBase,
    ):
        strings = tuple(strings)
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids))
        for string in strings:
            if not string:
                raise ValueError("rollout.stop: wanted texts of at least one character; got ''")
            inside = [token for token in special if token and token in string and token != string]
            if inside:
                raise ValueError(
                    f"rollout.stop: {string!r} holds the special token {inside[0]!r}, which is in no response's text; "
                    "give it alone"
                )
        self.decode = decode
        self.strings = tuple(string for string in strings if string not in special)
        alone = decode([[token] for token in range(len(tokenizer))]) if self.strings else []
        own = [token for token, text in enumerate(alone) if self._in(text)]
        self.tokens = tuple(sorted({*own, *(special[string] for string in strings if string in special)}))
        self.window = max((len(string.encode("utf-8")) for string in self.strings), default=0) + ROOM

    def _in(self, text: str) -> bool:
        return any(string in text for string in self.strings)

    def ended(self, rows: list[list[int]]) -> list[bool]:
        """Whether a string stands in the text of each row, the last `window` tokens of a response that goes on."""
        return [self._in(text) for text in self.decode(rows)] if self.strings else [False] * len(rows)

    def length(self, tokens: list[int]) -> int | None:
        """Tokens up to the one that completes a string, the first that does; None where none does."""
        if not self.ended([tokens])[0]:
            return None
        low, high = 1, len(tokens)  # what a text holds, a longer one holds too
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.ended([tokens[:middle]])[0] else (middle + 1, high)
        return low
