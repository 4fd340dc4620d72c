"""The house: which room may import which. Arrows point one way, the graph has no circle, and this parses them."""

import ast
import graphlib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flowrl_kernels"
CONTRACTS = {"core.types", "core.checks", "core.segments"}
SETTLED = CONTRACTS | {
    "core.dispatch",
    "core.layout",
    "core.head",
    "core.kept",
    "core.settle",
    "core.correction",
    "presets",
}
# a room may import the rooms named here (and itself); what is not named is not allowed. Lowest first
ALLOWED = {
    "core.types": set(),
    "core.checks": set(),
    "core.counter": set(),
    "core.segments": set(),
    "core.dispatch": set(),
    "presets": {"core.checks"},
    "core.layout": {"core.checks", "core.dispatch", "core.segments"},
    "core.head": {"core.checks", "core.counter", "core.dispatch", "core.types"},
    "core.kept": {"core.checks", "core.dispatch", "core.types"},
    "core.correction": {"core.checks", "core.segments"},
    "core.settle": SETTLED,
    "reference": {"core.types", "core.segments", "presets"},
    "cuda": {"core.types"},
    "chunked": {"core.types", "core.counter", "core.segments", "presets", "reference"},
    "triton": {"core.types", "core.segments", "core.dispatch", "presets", "chunked", "cuda"},
    "ops": {"core.types", "core.segments", "core.dispatch", "presets", "reference", "chunked"},
    "core.passes": SETTLED | {"ops"},
    "logprobs": SETTLED | {"ops", "reference"},
    "losses": SETTLED | {"ops", "reference"},
    "policy_gradient": SETTLED | {"reference"},
    "advantages": CONTRACTS | {"core.layout"},
    "log_partition": SETTLED | {"ops"},
    "modules": SETTLED | {"core.passes", "ops", "logprobs", "losses"},
    "testing": {"reference", "core.types"},
    "hf": set(),
    "core": set(),
}
DOORS = {"logprobs", "losses", "policy_gradient", "modules", "log_partition", "advantages", "presets"}
PUBLIC = DOORS | {"core.types", "core.checks", "core.dispatch", "hf", "__init__"}
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
}


def imported_modules(path):
    """Every module of the package that a file names in an import, wherever in the file it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flowrl_kernels":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES or node.module == "flowrl_kernels" else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "flowrl_kernels")


def room_of(module):
    parts = module.split(".")[1:]
    return ".".join(parts[:2]) if parts[:1] == ["core"] else parts[0] if parts else "__init__"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_one_way(path):
    relative = path.relative_to(PACKAGE)
    room = room_of(next(module for module, file in MODULES.items() if file == path))
    if room == "__init__":
        return
    rooms = {room_of(module) for module in imported_modules(path)} - {room}
    if room in ("trainer", "integrations"):
        public_names = {"linear_logprob", "logprob", "flowrl_loss"}
        assert rooms <= PUBLIC | public_names, f"{relative} reaches past the public doors: {rooms - PUBLIC}"
    else:
        assert rooms <= ALLOWED[room], f"{relative} imports upward: {rooms - ALLOWED[room]}"


def library_graph():
    """What each module of the library imports. The package itself only names where its public names live."""
    return {
        module: {name for name in imported_modules(path) if name in MODULES} - {"flowrl_kernels", module}
        for module, path in MODULES.items()
        if module != "flowrl_kernels" and room_of(module) not in ("trainer", "integrations")
    }


def test_the_import_graph_has_no_circle():
    graph = library_graph()
    assert sum(map(len, graph.values())) > 100
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names a circle
    assert order.index("flowrl_kernels.core.types") < order.index("flowrl_kernels.modules")


def test_only_stems_without_a_vocabulary_run_the_reference():
    """Under other names, that is: an operator runs it where impl="reference" asks for it."""
    users = {
        str(path.relative_to(PACKAGE))
        for path in (*PACKAGE.glob("chunked/*.py"), *PACKAGE.glob("triton/*.py"))
        if any(room_of(module) == "reference" for module in imported_modules(path))
    }
    assert users == {"chunked/residual.py"}


def test_a_circle_would_be_seen():
    graph = library_graph()
    graph["flowrl_kernels.core.types"] |= {"flowrl_kernels.modules"}
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()


def test_only_dispatch_reads_the_environment():
    readers = {str(p.relative_to(PACKAGE)) for p in FILES if "environ" in p.read_text() or "getenv" in p.read_text()}
    # parallel.py reads what torchrun sets; reward.py hands the environment on to its workers;
    # inside.py empties its own; vllm.py and serve.py set what vLLM reads and nothing else can set
    allowed = {"core/dispatch.py", "trainer/parallel.py", "trainer/reward.py", "trainer/sandbox/inside.py"}
    allowed |= {"trainer/rollout/vllm.py", "trainer/rollout/serve.py"}
    assert readers <= allowed, readers
