"""Runs the Python blocks of a markdown file, one after the other, with whatever is installed; exits 1 at an error."""

import re
import sys
from pathlib import Path

blocks = re.findall(r"```python\n(.*?)```", Path(sys.argv[1]).read_text(), re.DOTALL)
if not blocks:
    sys.exit(f"{sys.argv[1]} has no Python block")
for block in blocks:
    exec(compile(block, sys.argv[1], "exec"), {})
