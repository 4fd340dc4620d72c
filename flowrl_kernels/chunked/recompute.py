"""How many columns of logits a forward on a CPU keeps, so that its backward need not compute them again."""

from __future__ import annotations

KEPT = 48 << 20  # bytes that may be kept: a bound that no size of batch or vocabulary moves
LEAST = 4  # not less than this part of the vocabulary (1/4), or it saves less time than it costs memory
MOST = 13, 16  # not more than this share of what all logits would take in the inputs' dtype: this library does without
WIDTH = 1024  # columns are kept in whole tiles of the forward


def kept_shape(num_tokens: int, vocab_size: int, itemsize: int = 4) -> tuple[int, int]:
    """Rows and columns of the logits that are kept, (0, 0) for none: of sizes alone, that of the inputs' dtype too."""
    size = max(itemsize, 4)  # 16-bit inputs have fp32 logits
    share, whole = MOST[0] * itemsize, MOST[1] * size
    columns = min(KEPT // (max(num_tokens, 1) * size), share * vocab_size // whole) // WIDTH * WIDTH
    return (num_tokens, columns) if num_tokens > 0 and columns > 0 and columns * LEAST >= vocab_size else (0, 0)
