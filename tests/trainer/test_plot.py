import json
import math
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowrl_kernels.trainer import compare, config_file
from flowrl_kernels.trainer.plot import plot_runs, read_runs, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def fake_run(folder, steps=120, speed=1.0, flow=True, more=False):
    """A run folder with a metrics.jsonl of the shape that training writes."""
    folder.mkdir(parents=True)
    rows = [{"step": -1, "kind": "warm", "loss": 2.0}, {"step": 0, "kind": "note", "text": "hello"}]
    for step in range(steps + 1):
        done = 1 - math.exp(-speed * step / 40)
        if step:
            row = {"step": step, "kind": "train", "reward": done + 0.05 * math.sin(step * 9), "accuracy": done}
            row |= {
                "entropy": 1.5 - done * (0.4 if flow else 1.2),
            }
            row |= {"length": 6.0, "truncated": 0.1, "grad_norm": 0.3, "kl_ref": done, "clip_high": 0.1} if more else {}
            row |= {} if flow else {"clipped": 0.0}
            row |= (
                {"residual_abs": None if step == 7 else 4 * math.exp(-step / 30) + 0.3, "log_z": 1.2 * done}
                if flow
                else {}
            )
            rows.append(row)
        if step % 20 == 0:
            share = 0.9 * (1 - done) + (0.4 if flow else 0.03) * done
            row = {"step": step, "kind": "eval", "split": "valid", "accuracy": done, "pass@1": done}
            row |= {"pass@16": min(1, done * 1.2 + 0.1), "distinct": 0.5 + 8 * done * share, "exact_accuracy": done}
            rows.append(
                row
                | {"exact_modes_share": share, "exact_kl": 8 * math.exp(-speed * step / 25) + 0.2, "log_z_exact": 1.3}
            )
    rows.append(rows[-1] | {"split": "test", "accuracy": 0.8, "exact_accuracy": 0.8})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_one_png_per_panel_and_an_overview(tmp_path):
    run = fake_run(tmp_path / "flowrl", more=True)
    files = plot_runs([run])
    assert {f.name for f in files} == {
        "solve_rate.png", "distinct.png", "modes.png", "reward.png", "entropy.png", "residual.png", "log_z.png",
        "kl.png", "pass_at_k.png", "length.png", "truncated.png", "kl_ref.png", "grad_norm.png", "clipped.png",
        "overview.png",
    }  # fmt: skip
    assert all(f.parent == run / "plots" and f.read_bytes().startswith(PNG) for f in files)


def test_several_runs_are_overlaid_and_panels_without_data_left_out(tmp_path):
    runs = [fake_run(tmp_path / "a", flow=False), fake_run(tmp_path / "b", speed=2.0, flow=False)]
    names = {file.name for file in plot_runs(runs, tmp_path / "out")}
    assert "overview.png" in names
    assert not names & {"log_z.png", "residual.png", "kl_ref.png"}
    assert "clipped.png" in names  # that nothing is clipped is worth a line


def test_a_run_is_read_without_its_gaps_and_named_by_its_folder(tmp_path):
    first, second = read_runs([fake_run(tmp_path / "x" / "run"), fake_run(tmp_path / "y" / "run")])
    steps, values = first.curve("residual_abs")
    assert 7 not in steps
    assert len(steps) == len(values) == 119
    assert first.label != second.label
    assert first.colour != second.colour
    assert first.evaluated("accuracy")[0] == [0, 20, 40, 60, 80, 100, 120]
    assert first.tested("accuracy") == ([120], [0.8])


def test_smoothing_keeps_means_and_lengths():
    assert smooth([1.0, 2.0, 3.0, 4.0], 1) == [1.0, 2.0, 3.0, 4.0]
    assert smooth([0.0, 3.0, 0.0, 3.0, 0.0], 3) == [1.5, 1.0, 2.0, 1.0, 1.5]


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="is no run folder"):
        plot_runs([tmp_path])
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training step"):
        plot_runs([tmp_path])
    with pytest.raises(ValueError, match="at least one"):
        plot_runs([])


def test_a_comparison_runs_every_algorithm_with_the_same_overrides_and_shows_one_table(tmp_path, monkeypatch, capsys):
    commands = []

    def run(command, check):
        commands.append(config_file.load(command[-1]))
        folder = Path(commands[-1].run.dir)
        if folder.name == "ppo":
            return SimpleNamespace(returncode=3)
        fake_run(folder, steps=20)
        with (folder / "metrics.jsonl").open("a") as file:
            start = {"step": 0, "kind": "eval", "split": "test", "accuracy": 0.0625}
            final = {"step": 20, "kind": "final", "exact_accuracy": 0.875, "accuracy": 0.8, "pass@16": 1.0}
            file.write(json.dumps(start) + "\n" + json.dumps(final | {"exact_kl": None}) + "\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(compare.subprocess, "run", run)
    code = compare.main(["configs/sums.toml", "--out", str(tmp_path / "c"), "--run.steps", "20"])
    assert code == 1  # ppo failed, the others are shown
    assert all(config.run.steps == 20 for config in commands)
    assert [config.algorithm.name for config in commands] == ["flowrl", "grpo", "ppo", "reinforce_pp"]
    out, err = capsys.readouterr()
    assert "warm start" in out
    assert "0.875" in out
    assert "ppo failed with exit code 3" in err
    rows = json.loads((tmp_path / "c" / "compare.json").read_text())
    assert [row["run"] for row in rows] == ["warm start", "flowrl", "grpo", "reinforce_pp"]
    assert rows[0]["accuracy"] == 0.0625
    assert (tmp_path / "c" / "plots" / "overview.png").exists()


def test_a_run_without_final_figures_is_named(tmp_path):
    with pytest.raises(ValueError, match="has no final figures"):
        compare.row_of(fake_run(tmp_path / "a", steps=2), "a")
