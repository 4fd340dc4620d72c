"""verl: the Triton kernel (verl/utils/kernel) and the torch loop over 512 tokens (verl/utils/experimental).

Both files need little more than torch, but importing the package pulls in Ray and the trainer. Where that fails, a
bare namespace over the installed files stands in for `verl/__init__.py`.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache
from importlib.machinery import ModuleSpec
from typing import Any

from benchmarks.cases import Case
from benchmarks.inputs import Inputs
from benchmarks.peers import Outcome, Peer, installed, needs_cuda


@cache
def _load(module: str) -> tuple[Any | None, str]:
    try:
        return importlib.import_module(module), ""
    except Exception:
        for name in [name for name in sys.modules if name == "verl" or name.startswith("verl.")]:
            del sys.modules[name]
    spec = importlib.util.find_spec("verl")
    if spec is None or not spec.submodule_search_locations:
        return None, "verl is not installed"
    try:
        root = spec.submodule_search_locations[0]
        for package, folder in (("verl", root), ("verl.utils", f"{root}/utils")):
            bare = types.ModuleType(package)
            bare.__path__ = [folder]
            bare.__spec__ = ModuleSpec(package, None, is_package=True)
            bare.__spec__.submodule_search_locations = [folder]
            sys.modules[package] = bare
        return importlib.import_module(module), ""
    except Exception as error:
        return None, f"{module} does not import: {type(error).__name__}: {error}"


def _has(module: str, gpu_only: bool):
    def available(device: str) -> tuple[bool, str]:
        here = installed("verl", "verl")
        here = needs_cuda(device, here) if gpu_only else here
        if not here[0]:
            return here
        found, reason = _load(module)
        return (found is not None), reason or here[1]

    return available


KERNEL, TORCH = "verl.utils.kernel.linear_cross_entropy", "verl.utils.experimental.torch_functional"


def triton_kernel(case: Case, inputs: Inputs) -> Outcome:
    module, _ = _load(KERNEL)
    logp, entropy = module.linear_cross_entropy(inputs.hidden, inputs.weight, inputs.target, 1.0, "none")
    return Outcome(logp=logp, entropy=entropy)


def torch_loop(case: Case, inputs: Inputs) -> Outcome:
    module, _ = _load(TORCH)
    logp, entropy = module.FusedLinearForPPO(chunk_size=512)(inputs.hidden, inputs.weight, inputs.target, 1.0)
    return Outcome(logp=logp, entropy=entropy)


PEERS = [
    Peer("verl-triton", triton_kernel, _has(KERNEL, True), package="verl", note="always computes the entropy"),
    Peer("verl-torch", torch_loop, _has(TORCH, False), package="verl", note="512 tokens at a time, entropy always"),
]
