"""Build hook. Plain installs compile nothing; `FLOWRL_BUILD_CUDA=1` also builds csrc/ with nvcc. Never probes a GPU."""

from setuptools import setup

setup()
