"""Backends: an explicit request succeeds or raises with the reason; only `auto` chooses."""

import subprocess
import sys

import pytest
import torch

import flowrl_kernels
from flowrl_kernels import linear_logprob
from flowrl_kernels.core import dispatch
from flowrl_kernels.testing import peaked_inputs


def test_every_backend_says_what_it_is_or_why_not():
    known = flowrl_kernels.backends()
    assert set(known) == {*dispatch.IMPLS, "cuda"}
    assert all(backend.reason for backend in known.values())
    assert known["chunked"].available


def test_auto_on_a_cpu_is_chunked_and_can_be_replaced_by_the_environment(monkeypatch):
    cpu = torch.zeros(1)
    assert dispatch.resolve("linear_logprob", "auto", cpu) == "chunked"
    monkeypatch.setenv("FLOWRL_IMPL", "reference")
    assert dispatch.resolve("linear_logprob", "auto", cpu) == "reference"
    assert dispatch.resolve("linear_logprob", "chunked", cpu) == "chunked"
    monkeypatch.setenv("FLOWRL_IMPL", "fastest")
    with pytest.raises(ValueError, match="FLOWRL_IMPL.*'fastest'"):
        dispatch.resolve("linear_logprob", "auto", cpu)


def test_an_unknown_implementation_is_refused_by_name():
    hidden, weight, target = peaked_inputs(2, 4, 10)
    with pytest.raises(ValueError, match="impl: wanted one of .*'quick'"):
        linear_logprob(hidden, weight, target, impl="quick")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the request would succeed")
def test_an_explicit_request_that_cannot_run_raises_with_the_reason():
    hidden, weight, target = peaked_inputs(2, 4, 10)
    with pytest.raises(RuntimeError, match="impl='triton' was asked for and cannot run: ."):
        linear_logprob(hidden, weight, target, impl="triton")


def test_the_cuda_library_is_no_implementation_and_the_refusal_says_what_it_is():
    hidden, weight, target = peaked_inputs(2, 4, 10)
    with pytest.raises(
        ValueError, match="impl: wanted one of 'auto', 'reference', 'chunked', 'triton'; got 'cuda' .*routes"
    ):
        linear_logprob(hidden, weight, target, impl="cuda")


def test_importing_the_package_loads_neither_triton_nor_a_library():
    code = (
        "import sys, torch, time; had = 'triton' in sys.modules; start = time.perf_counter(); import flowrl_kernels;"
        "took = time.perf_counter() - start; flowrl_kernels.linear_logprob;"
        "assert had or 'triton' not in sys.modules; assert 'flowrl_kernels.triton' not in sys.modules;"
        "assert 'transformers' not in sys.modules; assert took < 1.0, took"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_triton_folder_does_not_shadow_triton():
    triton = pytest.importorskip("triton")
    assert "flowrl_kernels" not in triton.__file__


def test_every_public_name_loads():
    for name in flowrl_kernels.__all__:
        assert getattr(flowrl_kernels, name) is not None
    with pytest.raises(AttributeError):
        flowrl_kernels.no_such_name  # noqa: B018


def test_a_stem_that_an_implementation_does_not_have_is_named():
    with pytest.raises(RuntimeError, match="impl='triton'.*no triton implementation of context_parallel"):
        dispatch.resolve("context_parallel", "triton", torch.ones(1))
