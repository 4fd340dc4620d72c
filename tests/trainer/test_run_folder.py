"""The life of a run's folder: untouched by a refused start, replaced only by a run that starts, resumed by name."""

import json
import os
import pickle
import shutil
import signal
import sys

import pytest
import tiny
import torch

from flowrl_kernels.trainer import __main__ as main
from flowrl_kernels.trainer import checkpoint, config_file, fingerprint, loop, run_folder, stop, warm
from flowrl_kernels.trainer.config import Config

SMALL = [*tiny.SMALL, *tiny.flags("run.steps 2  checkpoint.every 1")]


def settings(tmp_path, *args, name="run"):
    base = [*SMALL, "--run.dir", str(tmp_path / name), "--run.cache", str(tmp_path / "cache")]
    return config_file.override(Config(), [*base, *args])


def train(tmp_path, *args, name="run"):
    return loop.train(settings(tmp_path, *args, name=name))


def tree(folder):
    """Every file's bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def lines(folder, kind):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row for row in rows if row["kind"] == kind]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A finished run of two steps with a model, to be copied."""
    tmp_path = tmp_path_factory.mktemp("made")
    train(tmp_path, "--checkpoint.export", "True")
    return tmp_path


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


# ------------------------------------------------------------------------------------------- refused starts


REFUSED = [
    ["--task.reward", "nowhere:reward"],
    ["--algorithm.preset", "papper"],
    ["--model.name", "nowhere"],
    ["--model.context", "8"],
]


@pytest.mark.parametrize("args", REFUSED, ids=" ".join)
def test_a_refused_start_makes_no_folder_and_the_repaired_one_runs(tmp_path, args):
    with pytest.raises((ValueError, OSError)):
        train(tmp_path, *args, name="new/run")
    assert list(tmp_path.iterdir()) == []
    train(tmp_path, "--run.steps", "0", name="new/run")


@pytest.mark.parametrize("args", REFUSED, ids=" ".join)
def test_a_refused_replacement_leaves_the_old_run_to_the_byte(place, args):
    before = tree(place / "run")
    with pytest.raises((ValueError, OSError)):
        train(place, "--run.overwrite", "True", *args)
    assert tree(place / "run") == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("where", ["train", "copy"])
def test_a_start_that_ends_half_way_brings_the_old_run_back(place, monkeypatch, error, where):
    aside = []

    def fail(*args):
        aside.append(not (place / "run" / "checkpoints").exists())
        raise error

    before = tree(place / "run")
    monkeypatch.setattr(warm, where, fail)
    more = ["--run.overwrite", "True", "--warm.steps", "2"]
    with pytest.raises(error):
        train(place, *more)
    assert tree(place / "run") == before
    with pytest.raises(error):
        train(place, *more, name="new")
    assert not (place / "new").exists()
    assert aside == [True, False]  # when the first one failed, the old run had been moved


def test_a_replacement_that_was_killed_half_way_is_undone_by_the_next_start(place):
    before = tree(place / "run")
    config = settings(place, "--run.overwrite", "True")
    run_folder.begin(place / "run", config, run_folder.Found("replace"))
    (place / "run" / "metrics.jsonl").write_text("new")
    assert tree(place / "run") != before
    with pytest.raises(ValueError, match="holds a run"):
        run_folder.look(place / "run", settings(place), tiny.ALONE)
    assert tree(place / "run") == before


def test_replacing_deletes_what_a_run_wrote_and_nothing_else(place):
    for name in ("notes.txt", "final/notes.txt", "plots/mine.svg", "checkpoints/readme"):
        (place / "run" / name).parent.mkdir(exist_ok=True)
        (place / "run" / name).write_text("mine")
    train(place, "--run.overwrite", "True", "--run.steps", "1")
    assert [row["step"] for row in lines(place / "run", "train")] == [1]
    assert not (place / "run" / "final" / "model.safetensors").exists()
    assert [p.name for p in (place / "run" / "checkpoints").glob("step_*")] == ["step_1"]
    for name in ("notes.txt", "final/notes.txt", "plots/mine.svg", "checkpoints/readme"):
        assert (place / "run" / name).read_text() == "mine"


@pytest.mark.parametrize("key", ["model.name", "task.train"])
def test_a_run_does_not_replace_the_model_or_data_it_needs(place, key):
    path = place / "run" / "final"
    if key == "task.train":
        path = path / "tokenizer.json"
    before = tree(place / "run")
    with pytest.raises(ValueError, match=rf"{key}: .*final.* run\.overwrite would replace"):
        train(place, "--run.overwrite", "True", f"--{key}", str(path))
    assert tree(place / "run") == before


def test_a_config_that_no_run_wrote_is_not_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text("# mine\n[run]\nsteps = 1\n")
    with pytest.raises(ValueError, match="was not written by a run"):
        train(tmp_path, "--run.overwrite", "True")
    assert (tmp_path / "run" / "config.toml").read_text().startswith("# mine")


# ------------------------------------------------------------------------------------------- resuming


def test_resuming_without_a_checkpoint_says_so_and_keeps_the_log(place):
    shutil.rmtree(place / "run" / "checkpoints")
    log = (place / "run" / "metrics.jsonl").read_text() + '{"step": 2, "ki'
    (place / "run" / "metrics.jsonl").write_text(log)
    train(place, "--run.resume", "True")
    text = (place / "run" / "metrics.jsonl").read_text()
    assert text.startswith(log + "\n")
    from flowrl_kernels.trainer.log import read_lines

    rows = read_lines(place / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows if row["kind"] == "train"] == [1, 2]
    assert any("no checkpoint yet, so nothing to resume" in row.get("text", "") for row in rows)


@pytest.mark.parametrize("harm", ["cut", "flipped", "missing", "no manifest"])
def test_a_damaged_checkpoint_is_set_aside_by_name_for_the_one_before(place, harm):
    newest = place / "run" / "checkpoints" / "step_2"
    file = newest / {"no manifest": "files.json"}.get(harm, "__0_0.distcp")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if harm in ("cut", "flipped"):
        file.write_bytes(data[:-1] if harm == "cut" else data)
    else:
        file.unlink()
    before = lines(place / "run", "train")[1]
    train(place, "--run.resume", "True")
    after = lines(place / "run", "train")
    assert [row["step"] for row in after] == [1, 2]
    assert (after[1]["loss"], after[1]["reward"]) == (before["loss"], before["reward"])
    notes = [row["text"] for row in lines(place / "run", "note")]
    assert any("checkpoint step_2 is damaged" in note for note in notes)
    assert "resumed from step 1" in notes
    assert {p.name for p in newest.parent.iterdir()} == {"step_1", "step_2", "step_2.damaged"}


def test_with_every_checkpoint_damaged_nothing_is_cut_and_nothing_starts(place):
    for path in (place / "run" / "checkpoints").iterdir():
        (path / ".metadata").write_bytes(b"")
    before = tree(place / "run")
    with pytest.raises(ValueError, match="no checkpoint .* is undamaged .*step_2: .metadata has 0 bytes"):
        train(place, "--run.resume", "True")
    assert tree(place / "run") == before


def test_data_or_a_model_that_changed_is_refused_on_resuming_until_it_is_meant(place):
    data = place / "data.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"{i}=", "answer": str(i)}) + "\n" for i in range(4, 10)))
    shutil.copytree(place / "run" / "final", place / "model")
    source = ["--model.name", str(place / "model"), "--task.name", "file", "--task.train", str(data)]
    source += ["--task.reward", "exact", "--task.chat_template", "False"]
    train(place, *source, name="own")
    more = [*source, "--run.resume", "True", "--run.steps", "3"]
    rows = data.read_text()
    data.write_text(rows.replace('"9="', '"8="'))
    before = tree(place / "own")
    with pytest.raises(ValueError, match=r"run\.resume: the data changed since step_2.*--run\.allow_changed True"):
        train(place, *more, name="own")
    data.write_text(rows)
    weights = place / "model" / "model.safetensors"
    blob = bytearray(weights.read_bytes())
    blob[-1] ^= 1
    weights.write_bytes(blob)
    with pytest.raises(ValueError, match=r"run\.resume: the model changed since step_2"):
        train(place, *more, name="own")
    assert tree(place / "own") == before
    train(place, *more, "--run.allow_changed", "True", name="own")
    assert [row["step"] for row in lines(place / "own", "train")] == [1, 2, 3]


def test_the_log_of_a_resumed_run_goes_to_tensorboard_once_a_step(place, monkeypatch):
    import types

    got = []
    board = types.SimpleNamespace(
        SummaryWriter=lambda folder: types.SimpleNamespace(
            add_scalar=lambda key, value, step: got.append((key, step)),
            add_text=lambda key, text, step: got.append((key, step)),
            close=lambda: None,
        )
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", board)
    (place / "run" / "tensorboard").mkdir()
    (place / "run" / "tensorboard" / "events.out.tfevents.1").write_text("old")
    train(place, "--run.resume", "True", "--run.steps", "4", "--log.tensorboard", "True")
    assert [step for key, step in got if key == "train/reward"] == [1, 2, 3, 4]
    assert [step for key, step in got if key == "samples"] == [1]
    assert not list((place / "run" / "tensorboard").iterdir())


def test_weights_and_biases_get_the_same_id_after_a_resume(place, monkeypatch):
    import types

    ids = []
    wandb = types.SimpleNamespace(
        Table=lambda columns, data: None,
        init=lambda **k: (
            ids.append((k["id"], k["resume"]))
            or types.SimpleNamespace(log=lambda metrics, step: None, finish=lambda: None)
        ),
    )
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for steps in ("3", "4"):
        train(place, "--run.resume", "True", "--run.steps", steps, "--log.wandb", "True")
    assert len(ids) == 2
    assert ids[0] == ids[1]
    assert ids[0][1] == "allow"


# ------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("every", ["0", "3"])
def test_a_signal_lets_the_step_end_and_leaves_its_checkpoint(tmp_path, monkeypatch, capsys, number, code, every):
    before = signal.getsignal(signal.SIGINT)  # ignored where the suite runs in the background
    collect = loop.collect
    monkeypatch.setattr(
        loop, "collect", lambda run, at: (at.step == 1 and os.kill(os.getpid(), number), collect(run, at))[1]
    )
    args = [*SMALL, "--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path / "c"), "--run.steps", "4"]
    (tmp_path / "a.toml").write_text("")
    args = ["train", str(tmp_path / "a.toml"), *args, "--checkpoint.every", every, "--eval.every", "2"]
    assert main.cli(args) == code
    assert capsys.readouterr().err.endswith("stopped after step 2; --resume continues from step 2\n")
    assert [row["step"] for row in lines(tmp_path / "run", "train")] == [1, 2]
    assert lines(tmp_path / "run", "eval") == []
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.setattr(loop, "collect", collect)
    assert main.cli([*args, "--resume"]) == 0
    assert [row["step"] for row in lines(tmp_path / "run", "train")] == [1, 2, 3, 4]
    assert [row["step"] for row in lines(tmp_path / "run", "eval")] == [2, 4]  # the one that the signal put off


def test_a_run_stopped_before_its_first_checkpoint_promises_none(tmp_path, monkeypatch, capsys):
    def stopped(run, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "collect", stopped)
    (tmp_path / "a.toml").write_text("")
    assert main.cli(["train", str(tmp_path / "a.toml"), *SMALL, "--run.dir", str(tmp_path / "run")]) == 130
    assert "no checkpoint was written, so there is nothing to resume" in capsys.readouterr().err


def test_a_second_sigint_ends_the_step_at_once(monkeypatch):
    with stop.watch() as watch, watch.waiting():
        watch.handle(signal.SIGINT, None)
        watch.handle(signal.SIGTERM, None)
        watch.since -= 1.0
        with pytest.raises(stop.Interrupted):
            watch.handle(signal.SIGINT, None)
    assert watch.number == signal.SIGINT


# ------------------------------------------------------------------------------------------- what others made


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def resealed(path):
    """The manifest of an attacker is right."""
    fingerprint.write_manifest(path, fingerprint.seal(p for p in path.iterdir() if p.name != fingerprint.MANIFEST))


@pytest.mark.parametrize("command", ["export", "eval", "resume"])
@pytest.mark.parametrize("part", ["metadata", "value", "generators"])
def test_a_checkpoint_that_would_run_code_is_refused(place, capsys, command, part):
    newest, mark = place / "run" / "checkpoints" / "step_2", place / "it ran"
    if part == "metadata":
        (newest / ".metadata").write_bytes(pickle.dumps(Evil(str(mark))))
    elif part == "generators":
        torch.save({"torch": Evil(str(mark))}, newest / "rng_0.pt")
    else:
        from flowrl_kernels.trainer import safe_reading

        contents = safe_reading.read_metadata(newest)
        torch.save(Evil(str(mark)), newest / "evil.distcp")
        for info in contents.storage_data.values():  # every value that is no tensor
            if info.relative_path == "__0_0.distcp":
                info.relative_path, info.offset = "evil.distcp", 0
                info.length = (newest / "evil.distcp").stat().st_size
        (newest / ".metadata").write_bytes(pickle.dumps(contents))
    resealed(newest)
    if command == "resume":
        (place / "a.toml").write_text("")
        args = ["train", str(place / "a.toml"), *SMALL, "--run.dir", str(place / "run"), "--resume"]
        args += ["--run.cache", str(place / "cache")]
    else:
        args = [command, str(place / "run"), *([str(place / "out")] if command == "export" else [])]
    code = main.cli(args)
    assert not mark.exists()
    if part != "generators" or command == "resume":  # which the others do not read
        assert code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_copied_run_cannot_switch_on_code_or_bring_its_own(place, capsys, monkeypatch):
    toml = place / "run" / "config.toml"
    text = toml.read_text().replace("trust_remote_code = false", "trust_remote_code = true")
    toml.write_text(text.replace('name = "sums"', 'name = "evil_task:make"'))
    (place / "run" / "evil_task.py").write_text("raise SystemExit('it ran')\n")
    from flowrl_kernels.trainer import export

    config, _ = export.open_run(place / "run")
    assert config.model.trust_remote_code
    assert not export.single(config).model.trust_remote_code
    monkeypatch.chdir(place / "run")
    monkeypatch.syspath_prepend(str(place / "run"))
    assert main.cli(["eval", "."]) == 2
    assert "which came with the run folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------- the warm start's cache


TASK = """
from flowrl_kernels.trainer.tasks.sums import Sums
class Mine(Sums):
    @property
    def hint(self):
        return {hint!r}
    def warm_start(self, rng, n):
        return [(problem, {hint!r}) for problem in self.problems("train")][:n]
def make(cfg):
    return Mine()
"""


def test_the_warm_start_is_made_anew_when_the_tasks_code_changes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    keys = []
    for hint in ("1+2+3", "4+5+6", "1+2+3"):
        (tmp_path / "task_of_mine.py").write_text(TASK.format(hint=hint))
        sys.modules.pop("task_of_mine", None)
        shutil.rmtree(tmp_path / "__pycache__", ignore_errors=True)
        train(
            tmp_path,
            "--task.name",
            "task_of_mine:make",
            "--warm.steps",
            "2",
            "--run.steps",
            "0",
            "--run.overwrite",
            "True",
        )
        keys.append({p.name for p in (tmp_path / "cache").iterdir()})
    assert len(keys[0]) == 1
    assert len(keys[1]) == 2
    assert keys[2] == keys[1]


def test_a_damaged_entry_of_the_cache_is_made_anew(tmp_path):
    args = ["--warm.steps", "2", "--run.steps", "0"]
    train(tmp_path, *args, name="a")
    [entry] = (tmp_path / "cache").iterdir()
    before = (entry / "model.safetensors").read_bytes()
    (entry / "model.safetensors").write_bytes(before[:-8] + bytes(8))
    train(tmp_path, *args, name="b")
    assert (entry / "model.safetensors").read_bytes() == before
    assert (tmp_path / "b" / "start" / "model.safetensors").read_bytes() == before
    assert any("is damaged (model.safetensors is not what was written): made anew" in row["text"]
               for row in lines(tmp_path / "b", "note"))  # fmt: skip
    assert list((tmp_path / "cache").iterdir()) == [entry]


def test_of_two_writers_of_a_cache_entry_the_first_wins_and_nothing_is_left_over(tmp_path):
    for i in range(2):
        (tmp_path / f"part{i}").mkdir()
        (tmp_path / f"part{i}" / "model.safetensors").write_text(f"weights {i}")
    for i in range(2):
        warm.move(tmp_path / f"part{i}", tmp_path / "entry")
    assert (tmp_path / "entry" / "model.safetensors").read_text() == "weights 0"
    assert [p.name for p in tmp_path.iterdir()] == ["entry"]


def test_a_run_folder_keeps_nothing_that_is_read_before_it_is_whole(made):
    run = made / "run"
    left = (".incomplete", ".old", ".replaced", ".replacing", ".discarded")
    assert not [p for p in run.rglob("*") if p.name.endswith(left)]
    assert fingerprint.damage(checkpoint.latest(run)) is None
