"""The house: which room may import which. Arrows point one way, and this parses them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flowrl_kernels"
# a room may import the rooms named here (and itself); what is not named is not allowed
ALLOWED = {
    "types": set(),
    "checks": set(),
    "dispatch": {"cuda", "triton", "chunked", "reference"},
    "reference": {"types", "presets"},
    "chunked": {"types", "cuda", "presets", "reference"},
    "triton": {"types", "dispatch", "presets", "chunked", "cuda"},
    "cuda": {"types"},
    "ops": {"chunked", "dispatch", "types", "presets", "reference"},
    "presets": {"types", "checks"},
    "linear_loss": {"dispatch", "losses", "presets", "functional", "ops", "reference", "types"},
    "functional": {"checks", "dispatch", "ops", "reference", "types"},
    "advantages": {"checks", "reference", "types"},
    "layout": {"checks", "dispatch", "reference"},
    "losses": {"checks", "dispatch", "layout", "ops", "reference", "types", "presets", "functional", "advantages"},
    "nn": {
        "losses",
        "layout",
        "linear_loss",
        "reference",
        "functional",
        "types",
        "checks",
        "presets",
        "advantages",
        "ops",
        "dispatch",
    },
    "testing": {"reference", "types"},
    "hf": set(),
}
PUBLIC = {"functional", "losses", "nn", "advantages", "types", "checks", "dispatch", "presets", "hf", "__init__"}


def imported_rooms(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flowrl_kernels":
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "flowrl_kernels" and len(parts) > 1:
                    yield parts[1]


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    room = relative.parts[0].removesuffix(".py")
    if room == "__init__":
        return
    rooms = set(imported_rooms(path)) - {room}
    if room in ("trainer", "integrations"):
        public_names = {"linear_logprob", "logprob", "flowrl_loss"}
        assert rooms <= PUBLIC | public_names, f"{relative} reaches past the public doors: {rooms - PUBLIC}"
    else:
        assert rooms <= ALLOWED[room], f"{relative} imports upward: {rooms - ALLOWED[room]}"


def test_only_dispatch_reads_the_environment():
    readers = {str(p.relative_to(PACKAGE)) for p in FILES if "environ" in p.read_text() or "getenv" in p.read_text()}
    # parallel.py reads what torchrun sets; reward.py hands the environment on to its workers;
    # inside.py empties its own
    allowed = {"dispatch.py", "trainer/parallel.py", "trainer/reward.py", "trainer/sandbox/inside.py"}
    assert readers <= allowed, readers
