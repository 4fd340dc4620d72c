"""csrc/: the kernels' inline functions, built for the CPU, against torch; the CUDA build and its C interface.

The tests marked gpu run the kernels themselves.
"""

import ctypes
import fcntl
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from flowrl_kernels import cuda
from flowrl_kernels.chunked import routing
from flowrl_kernels.cuda import routing as cuda_routing
from tests.test_routing import PAIRS, SHAPES, pairs_like, random_active

CSRC = Path(__file__).parent.parent / "csrc"
SPEC = importlib.util.spec_from_file_location("csrc_build", CSRC / "build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)


def built_once(tmp_path_factory, name, make):
    """A file that the test session makes once, whichever worker comes first."""
    root = tmp_path_factory.getbasetemp()
    root = root.parent if "PYTEST_XDIST_WORKER" in os.environ else root
    out = root / name
    with open(root / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not out.exists():
            made = make(out.with_suffix(".part"))
            made.rename(out)
    return out


def cpu_library(tmp_path_factory, name, source, *extra):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ here: the logic of the CUDA kernels is unproved")
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC"]

    def make(out):
        command = [compiler, *flags, "-fvisibility=hidden", *extra, "-x", "c++", "-", "-o", str(out)]
        subprocess.run(command, input=source, text=True, check=True, cwd=CSRC)
        return out

    return built_once(tmp_path_factory, name, make)


@pytest.fixture(scope="session")
def host(tmp_path_factory):
    path = cpu_library(tmp_path_factory, "libflowrl_host.so", (CSRC / "host.cpp").read_text(), "-I.")
    return cuda.load(path, "flowrl_host_")


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The kernels and their launches themselves, every CUDA thread a fiber on the CPU."""
    launch = r"(\w+(?:<\w+>)?)<<<(.+?), (\w+), 0, (.+?)>>>\("
    source, launches = re.subn(launch, r"emulated::launch(\2, \3, \4, \1, ", (CSRC / "routing.cu").read_text())
    assert launches == source.count("emulated::launch") == 8
    shim = Path(__file__).parent / "emulated"
    return cuda.load(cpu_library(tmp_path_factory, "libflowrl_emulated.so", source, "-I.", f"-I{shim}"))


@pytest.fixture(scope="session")
def library_path(tmp_path_factory):
    try:
        build.find_nvcc()
    except FileNotFoundError as error:
        pytest.skip(f"the CUDA library was not compiled, nor its interface looked at: {error}")

    def make(out):
        out.with_suffix(".log").write_text(build.build(out, ["-Xptxas=-v"]))
        return out

    return built_once(tmp_path_factory, "libflowrl_cuda.so", make)


@pytest.fixture(scope="session")
def library(library_path):
    return cuda.load(library_path)


@contextmanager
def _no_stream(device):
    yield 0


@pytest.fixture(params=["host", "emulated"])
def on_cpu(request, monkeypatch):
    """The wrappers of the CUDA library, calling one of the CPU builds on CPU tensors."""
    functions = request.getfixturevalue(request.param)
    monkeypatch.setattr(cuda, "functions", lambda: functions)
    monkeypatch.setattr(cuda_routing, "_current_stream", _no_stream)
    return cuda_routing


@pytest.fixture
def on_gpu(library, monkeypatch):
    monkeypatch.setattr(cuda, "functions", lambda: library)
    return cuda_routing


def check_drop_lightest(room, device):
    for name in PAIRS:
        for seed, shape in enumerate([(23, 37), (300, 40)]):
            cost, square, budget = (t.to(device) for t in pairs_like(name, shape, seed))
            active, spent = room.drop_lightest(cost, square, budget)
            expected = routing.drop_lightest(cost, square, budget)
            assert torch.equal(active, expected[0]), name
            assert torch.equal(spent, expected[1]), name
    empty = torch.zeros((0, 3), dtype=torch.float64, device=device)
    assert room.drop_lightest(empty, empty, torch.ones(2, dtype=torch.float64, device=device))[1].tolist() == [0, 0]


def check_block_lists(room, device):
    for shape in SHAPES:
        for share in (0.0, 0.1, 1.0):
            active = random_active(*shape, share).to(device)
            for got, expected in zip(room.block_lists(active), routing.block_lists(active), strict=True):
                assert got.dtype == expected.dtype
                assert torch.equal(got, expected), (shape, share)


CHECKS = [check_drop_lightest, check_block_lists]


@pytest.mark.parametrize("check", CHECKS)
def test_the_logic_of_the_kernels_gives_what_torch_gives(on_cpu, check):
    check(on_cpu, "cpu")


@pytest.mark.parametrize("check", CHECKS)
def test_the_order_of_threads_changes_nothing(emulated, check, monkeypatch):
    monkeypatch.setenv("FLOWRL_EMULATE_REVERSED", "1")
    monkeypatch.setattr(cuda, "functions", lambda: emulated)
    monkeypatch.setattr(cuda_routing, "_current_stream", _no_stream)
    check(cuda_routing, "cpu")


@pytest.mark.gpu
@pytest.mark.sanitize
@pytest.mark.parametrize("check", CHECKS)
def test_the_kernels_give_what_torch_gives(on_gpu, check):
    check(on_gpu, "cuda")


@pytest.mark.gpu
def test_the_kernels_give_the_same_bits_on_a_real_number_of_pairs(on_gpu):
    cost, square, budget = (t.cuda() for t in pairs_like("spread", (512, 1188)))
    active, spent = on_gpu.drop_lightest(cost, square, budget)
    expected = routing.drop_lightest(cost, square, budget)
    assert torch.equal(active, expected[0])
    assert torch.equal(spent, expected[1])
    for got, wanted in zip(on_gpu.block_lists(active), routing.block_lists(active), strict=True):
        assert torch.equal(got, wanted)
    assert torch.equal(on_gpu.drop_lightest(cost, square, budget)[1], spent)


def test_it_compiles_for_every_architecture_without_warnings_or_spills(library_path):
    log = library_path.with_suffix(".log").read_text()
    kernels = re.findall(r"Compiling entry function '(\w+)' for '(\w+)'", log)
    names = {name for name, _ in kernels}
    assert len(names) == 7, names
    assert build.ARCHS == ("80", "90a", "100a", "120")
    assert sorted(kernels) == sorted((name, f"sm_{arch}") for name in names for arch in build.ARCHS)
    assert log.count("0 bytes spill stores, 0 bytes spill loads") == len(kernels)
    assert "warning" not in log.lower()


def test_it_exports_the_interface_and_nothing_else(library_path, host):
    listed = subprocess.run(["nm", "-D", "--defined-only", str(library_path)], capture_output=True, text=True)
    names = {line.split()[-1].split("@")[0] for line in listed.stdout.splitlines()}
    assert names == {f"flowrl_{name}" for name in cuda.SIGNATURES}
    declared = (CSRC / "flowrl.h").read_text()
    assert {name for name in cuda.SIGNATURES if f"FLOWRL_NAME({name})(" not in declared} == set()
    assert declared.count("\nFLOWRL_API ") == len(cuda.SIGNATURES)
    assert f"#define FLOWRL_ABI_VERSION {cuda.ABI_VERSION}\n" in declared


@pytest.fixture(params=["host", "library"])
def either(request):
    return request.getfixturevalue(request.param)


def test_workspace_sizes_answer_without_a_device(either):
    assert 64 * 1024 <= either["drop_lightest_workspace_size"](600_000) <= 80 * 1024
    assert either["block_lists_workspace_size"](512, 1188) == 4 * 512 * 1188
    assert either["drop_lightest_workspace_size"](-1) == -1
    assert either["block_lists_workspace_size"](1 << 20, 1 << 20) == -5
    assert either["block_lists_workspace_size"](1 << 62, 4) == -5


def test_bad_arguments_come_back_as_codes_with_a_sentence(either):
    memory = ctypes.create_string_buffer(1 << 17)
    at = ctypes.addressof(memory)
    at += -at % 16
    size = 1 << 16 | 1 << 12
    drop, lists = either["drop_lightest"], either["block_lists"]
    codes = {
        "a negative size": (drop(at, at, -1, at, at, at, at, size, 0), 1),
        "a null array": (drop(None, at, 4, at, at, at, at, size, 0), 2),
        "a null budget": (drop(at, at, 0, None, at, at, at, size, 0), 2),
        "a null workspace": (drop(at, at, 4, at, at, at, None, 0, 0), 2),
        "a small workspace": (drop(at, at, 4, at, at, at, at, 100, 0), 3),
        "an unaligned workspace": (drop(at, at, 4, at, at, at, at + 8, size, 0), 4),
        "too many pairs": (lists(at, 1 << 16, 1 << 16, at, at, at, at, at, at, size, 0), 5),
        "a null list": (lists(at, 2, 2, at, None, at, at, at, at, size, 0), 2),
    }
    assert {what: got for what, (got, wanted) in codes.items() if got != wanted} == {}
    sentences = {either["error_string"](code) for code in range(6)}
    assert len(sentences) == 6
    assert either["error_string"](999) == b"unknown error code"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the launch would succeed")
def test_a_launch_without_a_device_is_an_error_code(library):
    memory = ctypes.create_string_buffer(1 << 17)
    at = ctypes.addressof(memory)
    at += -at % 16
    for code in (
        library["block_lists"](at, 2, 2, at, at, at, at, at, at, 1 << 12, 0),
        library["drop_lightest"](at, at, 4, at, at, at, at, 1 << 16 | 1 << 12, 0),
    ):
        assert code > 1000
        assert library["error_string"](code) not in (b"no error", b"unknown error code")


def test_the_wrappers_name_the_tensor_they_refuse(on_cpu):
    cost, budget = torch.ones((4, 6), dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"square: wanted torch.float64, got torch.float32"):
        on_cpu.drop_lightest(cost, cost.float(), budget)
    with pytest.raises(ValueError, match=r"budget: wanted shape \(2,\), got \(4, 6\)"):
        on_cpu.drop_lightest(cost, cost, cost)
    with pytest.raises(ValueError, match=r"cost: wanted a contiguous tensor"):
        on_cpu.drop_lightest(cost.T, cost.T, budget)
    with pytest.raises(ValueError, match=r"active: wanted two dimensions"):
        on_cpu.block_lists(torch.ones(3, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"active: wanted torch.bool, got torch.uint8"):
        on_cpu.block_lists(torch.ones((2, 2), dtype=torch.uint8))


def test_the_library_says_why_it_cannot_be_used(library_path, monkeypatch, tmp_path):
    def status_of(path):
        monkeypatch.setattr(cuda, "PATH", path)
        cuda._load.cache_clear()
        return cuda.status()

    try:
        assert status_of(tmp_path / "none.so") == (
            False,
            "not built (FLOWRL_BUILD_CUDA=1 pip install . or `make csrc`)",
        )
        broken = tmp_path / "broken.so"
        broken.write_bytes(b"nothing")
        assert status_of(broken)[1].startswith("built, but does not load")
        monkeypatch.setattr(cuda, "ABI_VERSION", 99)
        assert "ABI version 3, this package needs 99" in status_of(library_path)[1]
        monkeypatch.undo()
        available, reason = status_of(library_path)
        assert available == (torch.cuda.is_available() and torch.version.cuda is not None)
        if not available:
            assert reason.startswith("built, but ")
            with pytest.raises(RuntimeError, match="the CUDA library cannot be used: built, but"):
                cuda_routing.block_lists(torch.ones((2, 2), dtype=torch.bool))
    finally:
        monkeypatch.undo()
        cuda._load.cache_clear()


def test_a_build_without_nvcc_says_what_to_do(monkeypatch):
    monkeypatch.setattr(build.Path, "exists", lambda self: False)
    with pytest.raises(FileNotFoundError, match="nvcc was found neither in CUDA_HOME/bin.*build without FLOWRL_BUILD"):
        build.find_nvcc()
    monkeypatch.undo()
    monkeypatch.setenv("FLOWRL_CUDA_ARCHS", "sm_90a, 120")
    assert build.chosen_archs() == ("90a", "120")
    monkeypatch.setenv("FLOWRL_CUDA_ARCHS", "hopper")
    with pytest.raises(ValueError, match="FLOWRL_CUDA_ARCHS: wanted names like .*'hopper'"):
        build.chosen_archs()


def test_the_build_script_needs_neither_torch_nor_a_device():
    code = f"import sys, runpy; runpy.run_path({str(CSRC / 'build.py')!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
