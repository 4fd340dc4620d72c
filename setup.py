"""Build hook. Plain installs compile nothing; `FLOWRL_BUILD_CUDA=1` also builds csrc/ with nvcc. Never probes a GPU."""

import importlib.util
import os
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

WITH_CUDA = os.environ.get("FLOWRL_BUILD_CUDA", "0") == "1"


def csrc_build():
    """csrc/build.py as a module; it is a script, not a part of the package."""
    spec = importlib.util.spec_from_file_location("csrc_build", Path(__file__).parent / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class BuildPy(build_py):
    def run(self):
        super().run()
        if WITH_CUDA:
            build = csrc_build()
            inside = build.IN_PLACE.relative_to(Path(__file__).parent.resolve())
            # an editable install imports from the source tree
            build.build(build.IN_PLACE if self.editable_mode else Path(self.build_lib) / inside)


class BdistWheel(bdist_wheel):
    """With the library inside, a wheel is for one platform, and still for every Python."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = not WITH_CUDA

    def get_tag(self):
        tag = super().get_tag()
        return ("py3", "none", tag[2]) if WITH_CUDA else tag


setup(cmdclass={"build_py": BuildPy, "bdist_wheel": BdistWheel})
