"""Kernels under Triton's interpreter: TRITON_INTERPRET must be set before triton is imported, so these files run in
processes of their own, which tests/test_interpreter.py starts.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
