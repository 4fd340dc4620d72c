"""The rooms of the trainer: who imports whom, whatever the indentation, has no circle."""

import ast
import graphlib
from pathlib import Path

from flowrl_kernels import trainer

ROOT = Path(trainer.__file__).parent
NAME = "flowrl_kernels.trainer"


def modules():
    """{module's name: file}, a folder's __init__ under the folder's name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join((NAME, *(part for part in parts if part != "__init__")))] = path
    return found


def imported(path, known):
    """Modules of the trainer that a file names in any import: at its top, in a function, under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield from {name if name in known else node.module} & known.keys()
        elif isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & known.keys()


def test_no_file_of_the_trainer_imports_itself_round_a_corner():
    known = modules()
    graph = {name: set(imported(path, known)) - {NAME} for name, path in known.items()}
    assert len(graph) > 30
    assert sum(map(len, graph.values())) > 100
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert order.index(f"{NAME}.config") < order.index(f"{NAME}.records") < order.index(f"{NAME}.loop")


def test_what_counts_does_not_write_and_what_is_written_with_does_not_count():
    known = modules()
    writers = {f"{NAME}.{name}" for name in ("log", "plot", "report", "terminal", "run_folder")}
    for name in ("measure", "evaluate", "shaping", "objective", "batches", "algorithms"):
        assert not writers & set(imported(known[f"{NAME}.{name}"], known)), name
    counts = {f"{NAME}.{name}" for name in ("measure", "shaping", "objective", "batches", "loop", "run")}
    for name in writers:
        assert not counts & set(imported(known[name], known)), name
