"""What can go wrong with an engine that is somebody else's process, and how often it is tried again."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
LONGEST = 30.0  # seconds between two tries


class EngineError(RuntimeError):
    """The rollout engine cannot be used any more: what failed, where, and how often it was tried."""


class Fault(RuntimeError):
    """One answer that cannot be used: garbage, short, or of other weights than were pushed. The next may be good."""


def again(action: Callable[[], T], *, retries: int, what: str, wait: float = 1.0) -> T:
    """`action()`, tried once and then up to `retries` times more, after `wait`, 2 `wait`, 4 `wait`, ... seconds.

    Raises:
        EngineError: it failed each time; names `what`, the last cause and the number of tries.
    """
    for attempt in range(retries + 1):
        try:
            return action()
        except (OSError, Fault) as error:
            cause: Exception = error
            if attempt < retries:
                time.sleep(min(wait * 2**attempt, LONGEST))
    why = str(cause) or type(cause).__name__
    raise EngineError(f"{what}: {why} (tried {retries + 1} times)") from cause
