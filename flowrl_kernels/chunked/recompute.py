"""How many columns of logits a forward on a CPU keeps, so that its backward need not compute them again."""

from __future__ import annotations

KEPT = 12 << 20  # logits that may be kept (48 MB in fp32): a bound that no size of batch or vocabulary moves
LEAST = 0.25  # share of the vocabulary below which keeping saves less time than it costs memory
MOST = 0.875  # share above which the logits themselves would be what this library does without
ROWS = 256  # rows are kept in whole blocks of the forward
WIDTH = 1024  # and columns in whole tiles


def kept_shape(num_tokens: int, vocab_size: int) -> tuple[int, int]:
    """Rows and columns of the logits that are kept, (0, 0) for none: of the two sizes alone."""
    rows = -(-num_tokens // ROWS) * ROWS
    columns = min(KEPT // max(rows, 1), int(MOST * vocab_size)) // WIDTH * WIDTH
    return (rows, columns) if rows > 0 and columns >= LEAST * vocab_size else (0, 0)
