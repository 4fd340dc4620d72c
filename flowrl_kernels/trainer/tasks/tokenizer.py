"""A character-level Hugging Face tokenizer, built in code: no files, no downloads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, EOS = "<pad>", "<eos>"


def check_characters(texts: Iterable[str], alphabet: str, what: str) -> None:
    """Raises ValueError for a text that the alphabet cannot spell."""
    for text in texts:
        strange = "".join(dict.fromkeys(c for c in text if c not in alphabet))
        if strange:
            raise ValueError(f"task: alphabet {alphabet!r} lacks {strange!r}, which the {what} {text!r} has")


def char_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """One token per character: id 0 is padding, 1 ends a sequence, then `alphabet` in order.

    Encoding adds no special tokens; a character outside the alphabet raises. Saved with `save_pretrained`, it
    loads by `AutoTokenizer.from_pretrained`. Raises ValueError for an empty alphabet or a repeated character.
    """
    if not alphabet or len(set(alphabet)) != len(alphabet):
        raise ValueError(f"alphabet must be distinct characters, at least one, got {alphabet!r}")
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: index for index, piece in enumerate([PAD, EOS, *alphabet])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
