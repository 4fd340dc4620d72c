"""The kernels' table of settings: what a row may say, that it is honoured, and that it travels with the package."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its table is not read")
from benchmarks import tune
from flowrl_kernels.triton import tiles

ROOT = Path(__file__).parents[1]
ROW = {"arch": "sm_90", "dtype": "bfloat16", "h": 3584, "num_stages": 3, "raster": 0.5, "source": "a machine"}


def table(folder, *rows):
    path = folder / "tiles.json"
    path.write_text(json.dumps({"schema": 1, "rows": list(rows)}))
    return path


@pytest.fixture
def only_row(tmp_path, monkeypatch):
    monkeypatch.setattr(tiles, "TABLE", table(tmp_path, ROW))
    tiles._table.cache_clear()
    yield
    tiles._table.cache_clear()


def test_a_row_is_honoured_for_its_architecture_dtype_and_hidden_size_alone(only_row):
    default = tiles.tile_for("sm_90", torch.bfloat16, True)
    tuned = tiles.tile_for("sm_90", torch.bfloat16, True, 3584)
    assert tuned == default._replace(num_stages=3, raster=0.5)
    assert tuned != default
    assert tiles.tile_for("sm_90", torch.bfloat16, True, 4096) == default
    assert tiles.tile_for("sm_90", torch.float16, True, 3584) == default
    assert tiles.tile_for("sm_80", torch.bfloat16, True, 3584) == tiles.tile_for("sm_80", torch.bfloat16, True)
    assert tiles.tile_for("sm_90", torch.bfloat16, False, 3584) == tiles.tile_for("sm_90", torch.bfloat16, False)
    assert tiles.group_rows(3584, 2, tuned) < tiles.group_rows(3584, 2, default)


def test_no_row_can_change_what_the_bits_depend_on(tmp_path):
    fixed = set(tiles.Tile._fields) - set(tiles.FREE)
    assert fixed == {"block_m", "block_n", "block_k", "num_warps", "descriptor"}
    for name in fixed:
        with pytest.raises(ValueError, match=f"row 0, {name}: wanted only .*bits of logp"):
            tiles.read_table(table(tmp_path, {**ROW, name: 1}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_stages": 0}, "row 1, num_stages: wanted a number .int. from 1 to 8; got 0"),
        ({"num_stages": 2.5}, "row 1, num_stages: .*got 2.5"),
        ({"programs_per_sm": True}, "row 1, programs_per_sm: .*got True"),
        ({"raster": "wide"}, "row 1, raster: .*got 'wide'"),
        ({"h": "3584"}, "row 1, h: wanted a value of type int; got '3584'"),
        ({"arch": "sm_70"}, "row 1: wanted an architecture of sm_80"),
        ({"dtype": "float64"}, "row 1: wanted an architecture .* and a dtype"),
        ({"h": 3584}, "row 1: wanted each architecture, dtype and hidden size once"),
    ],
)
def test_a_row_that_is_wrong_is_refused_by_number_and_name(tmp_path, change, message):
    path = table(tmp_path, ROW, {**ROW, "h": 4096, **change})
    with pytest.raises(ValueError, match=message) as caught:
        tiles.read_table(path)
    assert str(path) in str(caught.value)


def test_a_file_that_is_no_table_is_refused(tmp_path):
    for text in ("{", "[]", "{}"):
        (tmp_path / "tiles.json").write_text(text)
        with pytest.raises(ValueError, match="tiles.json: wanted an object with a list of"):
            tiles.read_table(tmp_path / "tiles.json")


def test_every_committed_row_is_sound():
    for (arch, *_), settings in tiles.read_table(tiles.TABLE).items():
        assert arch in tiles.ARCHS
        assert settings


def entry(kind, milliseconds, **change):
    own = tiles.tile_for("sm_90", torch.bfloat16, True)
    return {"kind": kind, **own._replace(**change)._asdict(), "median_ms": milliseconds, "same_bits": True}


def document(best, h=3584):
    head = {"arch": "sm_90", "dtype": "bfloat16", "h": h, "tokens": 8192, "best": best}
    return {
        "machine": {"gpu": "a GPU"}, "versions": {"triton": "3.7.1"}, "started": "2026-01-01T00:00:00",
        "heads": [{**head, "candidates": [entry("table", 10.0)]}],
    }  # fmt: skip


def test_a_tuning_run_becomes_rows_that_the_kernels_read(tmp_path, monkeypatch):
    path = table(tmp_path, ROW, {**ROW, "h": 4096})
    monkeypatch.setattr(tiles, "TABLE", path)
    runs = [document(entry("free", 9.0, num_stages=2, programs_per_sm=2, raster=2.0)), document(None, h=1536)]
    for name, run in zip("ab", runs):
        (tmp_path / name).write_text(json.dumps(run))
    assert tune.main(["--adopt", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert tiles.read_table(path) == {
        ("sm_90", "bfloat16", 3584): {"num_stages": 2, "programs_per_sm": 2, "raster": 2.0, "flatten": True},
        ("sm_90", "bfloat16", 4096): {"num_stages": 3, "raster": 0.5},
    }
    assert "a GPU" in path.read_text()


def test_what_is_no_faster_or_changes_blocks_is_not_adopted():
    for best in (entry("free", 9.95, num_stages=2), entry("blocks", 5.0, block_k=32), entry("table", 10.0)):
        assert tune.rows_of(document(best)) == []


def test_every_free_candidate_keeps_the_blocks_and_none_is_the_table_itself():
    own = tiles.tile_for("sm_90", torch.bfloat16, True)
    kinds = {}
    for kind, change in tune.candidates(own)[1:]:
        kinds.setdefault(kind, []).append(change)
    made = {own._replace(**change) for change in kinds["free"]}
    assert own not in made
    assert len(made) == len(kinds["free"]) == len(tune.STAGES) * len(tune.FLATTENED) + len(tune.RASTERS) - 1
    for tile in made:
        assert all(getattr(tile, name) == getattr(own, name) for name in set(own._fields) - set(tiles.FREE))
    assert {tile.flatten for tile in made} == {True, False}
    assert {tile.num_stages for tile in made if tile.flatten} == {2, 3, 4}
    assert [change["tiles_a_split"] for change in kinds["splits"]] == list(tune.SPLITS)
    assert kinds["blocks"]


def test_a_candidate_reaches_the_launchers_and_leaves_them_as_they_were():
    from flowrl_kernels.triton import linear_logprob as room

    own, length = tiles.tile_for("sm_90", torch.bfloat16, True), tiles.splits("sm_90", 64, 5000, 256)
    with tune.Overrides() as overrides:
        overrides.change = {"flatten": False, "num_stages": 3}
        assert room.tiles.tile_for("sm_90", torch.bfloat16, True) == own._replace(flatten=False, num_stages=3)
        assert room.tiles.splits("sm_90", 64, 5000, 256) == length
        overrides.change = {"tiles_a_split": 9}
        assert room.tiles.splits("sm_90", 64, 5000, 256) == (3, 9)
        assert room.tiles.tile_for("sm_90", torch.bfloat16, True) == own
    assert room.tiles.splits("sm_90", 64, 5000, 256) == length


def test_a_split_ends_with_its_tiles_and_no_setting_of_the_table_moves_it(monkeypatch):
    for vocab in (5, 257, 2500, 49152, 128256, 151936, 262144, 1 << 23):
        for arch in tiles.ARCHS:
            count, length = tiles.splits(arch, 2048, vocab, 256)
            covered = -(-vocab // 256)
            assert (count - 1) * length < covered <= count * length
            assert count <= 1024
    # all that reaches bits: no tuned field is asked for
    assert list(tiles.splits.__wrapped__.__annotations__) == ["arch", "hidden", "vocab", "block_n", "return"]
    assert tiles.splits("sm_90", 3584, 152064, 256) == (198, 3)
    assert tiles.splits("sm_90", 4096, 128256, 256) == (251, 2)


@pytest.mark.parametrize(("value", "right"), [(True, True), (False, True), (1, False), (0.0, False), ("true", False)])
def test_one_loop_or_two_is_true_or_false(tmp_path, value, right):
    path = table(tmp_path, {**ROW, "flatten": value})
    if right:
        assert tiles.read_table(path)["sm_90", "bfloat16", 3584]["flatten"] is value
    else:
        with pytest.raises(ValueError, match="row 0, flatten: wanted true or false; got"):
            tiles.read_table(path)


@pytest.mark.slow
def test_the_table_is_installed_with_the_wheel(tmp_path):
    source = tmp_path / "source"
    shutil.copytree(ROOT / "flowrl_kernels", source / "flowrl_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "setup.py", "-q", "bdist_wheel", "--dist-dir", str(tmp_path)]
    made = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
    [wheel] = tmp_path.glob("*.whl")
    assert "flowrl_kernels/triton/tiles.json" in zipfile.ZipFile(wheel).namelist()
