"""Where the host waits for the GPU."""

import warnings
from contextlib import contextmanager

import torch


@contextmanager
def host_waits():
    """A list that holds, after the block, one message for each time the host waited inside."""
    waits = []
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode("default")
            waits += [str(warning.message) for warning in seen if "synchroniz" in str(warning.message)]
