"""What people have on disk becomes rows, or is refused by file and line."""

import gzip
import json
import sys
import types

import pytest

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.tasks import build_task
from flowrl_kernels.trainer.tasks.dataset import read_problems
from flowrl_kernels.trainer.tasks.rows import rows

ROW = {"prompt": "one", "answer": "1"}
VERL = {
    "data_source": "openai/gsm8k",
    "prompt": [{"role": "user", "content": "2 + 2?"}],
    "ability": "math",
    "reward_model": {"ground_truth": "4", "style": "rule"},
    "extra_info": {"index": 0, "split": "train"},
}


def read(path, prompt="prompt", answer="answer"):
    return [(p.prompt, p.answer) for p in read_problems(str(path), prompt, answer)]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content, encoding="utf-8")
    return path


TWO = [("one", "1"), ("two", "2")]
LINE = '{"prompt": "one", "answer": "1"}'
LINE2 = '{"prompt": "two", "answer": "2"}'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", f"{LINE}\n{LINE2}"),
        ("a.jsonl", f"\ufeff{LINE}\r\n\r\n{LINE2}\r\n"),
        ("a.jsonl", f"{LINE}\r{LINE2}"),
        ("a.ndjson", f"{LINE}\n\n \n{LINE2}\n"),
        ("a.json", f"{LINE}\n{LINE2}\n"),
        ("a.json", f"[{LINE},\n{LINE2}]"),
        ("a.json", f'{{"data": [{LINE}, {LINE2}]}}'),
        ("a.json", f'{{"version": "1", "data": [{LINE}, {LINE2}]}}'),
        ("a.json", f'{{"rows": [{LINE}, {LINE2}]}}'),
        ("a.csv", "prompt,answer\none,1\ntwo,2\n"),
        ("a.csv", '\ufeffanswer,prompt\r\n1,"one"\r\n\r\n2,"two"\r\n'),
        ("a.tsv", "prompt\tanswer\none\t1\ntwo\t2\n"),
        ("a.jsonl.gz", gzip.compress(f"{LINE}\n{LINE2}".encode(), mtime=0)),
        ("a.json.gz", gzip.compress(f"[{LINE}, {LINE2}]".encode(), mtime=0)),
        ("A.JSONL", f"{LINE}\n{LINE2}"),
    ],
)
def test_every_text_form_gives_the_same_rows(tmp_path, name, content):
    assert read(write(tmp_path / name, content)) == TWO


def test_line_separators_inside_a_text_end_no_line(tmp_path):
    file = write(tmp_path / "a.jsonl", '{"prompt": "a\u2028b\x85c", "answer": "1"}\n')
    assert read(file) == [("a\u2028b\x85c", "1")]
    file = write(tmp_path / "a.csv", 'prompt,answer\n"two\nlines",1\nx\n')
    with pytest.raises(ValueError, match=r"a.csv:4: 1 cells for 2 columns"):
        read(file)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", f"{LINE}\n\n{{nope\n", r"a.jsonl:3: not JSON"),
        (
            "a.jsonl",
            LINE.encode() + b"\n" + b'{"prompt": "caf\xe9", "answer": 1}\n',
            r"a.jsonl:2: not UTF-8 \(byte 0xe9",
        ),
        ("a.jsonl", LINE.encode("utf-16"), "a.jsonl:1: UTF-16; wanted UTF-8"),
        ("a.jsonl", f"{LINE}\n" + '{"prompt": "x", "answer": NaN}', "a.jsonl:2: 'answer' is nan"),
        ("a.jsonl", f"{LINE}\n" + '{"prompt": "x", "answer": " "}', "a.jsonl:2: 'answer' is empty"),
        ("a.jsonl", f"{LINE}\n" + '{"prompt": ["x"], "answer": "1"}', "a.jsonl:2: the prompt must be text"),
        ("a.jsonl", "[" * 100000, "a.jsonl:1: not JSON"),
        ("a.json", f"[{LINE},\n\n{LINE2},\n17]", "a.json:4: wanted an object"),
        ("a.json", f"[{LINE},\n{{nope}}]", "a.json:2: not JSON"),
        ("a.json", f"[{LINE}\n{LINE2}]", "a.json:2: not JSON"),
        ("a.json", f"[{LINE}]\n]", "a.json:2: something after"),
        ("a.json", f'{{"data": [{LINE},\n{{"prompt": "x"}}]}}', "a.json:2: no 'answer'"),
        ("a.json", f'{{"a": [{LINE}], "b": [{LINE}]}}', r"several lists of rows \('a', 'b'\); choose one by"),
        ("a.csv", "prompt,answer\none,\n", "a.csv:2: 'answer' is empty"),
        ("a.csv", "prompt,prompt\none,1\n", "a.csv:1: a column name comes twice"),
        ("a.jsonl.gz", gzip.compress(LINE.encode(), mtime=0)[:-9], "a.jsonl.gz:[12]: broken gzip"),
        ("a.jsonl.gz", LINE, "a.jsonl.gz:1: broken gzip"),
        ("a.txt", LINE, "a.txt: wanted a .jsonl"),
        ("a.jsonl", "\n", "a.jsonl: no rows"),
        ("a.csv", "", "a.csv: no rows"),
        ("a.json", "[]", "a.json: no rows"),
    ],
)
def test_what_cannot_be_read_is_named_by_file_and_line(tmp_path, name, content, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / name, content))


def test_nested_keys_lead_into_objects_and_lists(tmp_path):
    file = write(tmp_path / "a.jsonl", json.dumps(VERL))
    assert read(file, "prompt", "reward_model.ground_truth") == [(VERL["prompt"], "4")]
    assert read(file, "prompt.0.content", "reward_model.ground_truth") == [("2 + 2?", "4")]
    for key in ("reward_model.truth", "prompt.1.content", "prompt.x", "data_source.0", "reward_model."):
        with pytest.raises(ValueError, match=f"a.jsonl:1: no '{key}' in this row .it has 'data_source'"):
            read(file, "prompt", key)
    dotted = write(tmp_path / "b.jsonl", json.dumps({"prompt": "x", "a.b": "1"}))
    assert read(dotted, "prompt", "a.b") == [("x", "1")]
    both = write(tmp_path / "c.jsonl", json.dumps({"prompt": "x", "a.b": "1", "a": {"b": "2"}}))
    with pytest.raises(ValueError, match="c.jsonl:1: 'a.b' is both a column and a way into one"):
        read(both, "prompt", "a.b")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "human", "content": "hi"}], "role must be one of .* got 'human'"),
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": "4"}], "ends with the assistant's"),
        ([{"role": "user", "content": [{"type": "image"}]}], "the prompt must be text"),
        ([{"role": "user", "content": "hi", "tool_calls": [1]}], "has 'tool_calls' beside"),
    ],
)
def test_chats_that_a_template_would_bend_are_refused(tmp_path, messages, message):
    with pytest.raises(ValueError, match=message):
        read(write(tmp_path / "a.jsonl", json.dumps({"prompt": messages, "answer": 1})))


def test_text_parts_of_a_message_are_joined_and_empty_fields_left_out(tmp_path):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    row = {"prompt": [{"role": "user", "content": parts, "name": None, "tool_calls": []}], "answer": 1}
    assert read(write(tmp_path / "a.jsonl", json.dumps(row))) == [([{"role": "user", "content": "ab"}], 1)]


def test_a_folder_of_shards_is_one_split_or_asks_which(tmp_path):
    for name, line in (("train-00000-of-00002.jsonl", LINE), ("train-00001-of-00002.jsonl", LINE2), ("README.md", "x")):
        write(tmp_path / "d" / name, line)
    assert read(tmp_path / "d") == TWO
    assert read(f"{tmp_path}/d:train") == TWO
    write(tmp_path / "d" / "test.jsonl", LINE)
    assert read(f"{tmp_path}/d:test") == TWO[:1]
    with pytest.raises(ValueError, match="files of several splits; choose one of 'test', 'train' as .*d:split"):
        read(tmp_path / "d")
    with pytest.raises(ValueError, match="no file of split 'valid' in this folder .it has 'README.md'"):
        read(f"{tmp_path}/d:valid")
    write(tmp_path / "d" / "train.csv", "prompt,answer\n")
    with pytest.raises(ValueError, match="files of several kinds"):
        read(f"{tmp_path}/d:train")
    write(tmp_path / "e" / "test" / "a.jsonl", LINE)
    assert read(f"{tmp_path}/e:test") == TWO[:1]
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no data files in this folder"):
        read(tmp_path / "none")


def test_a_bad_line_in_a_shard_is_named_by_its_file(tmp_path):
    write(tmp_path / "d" / "0.jsonl", LINE)
    write(tmp_path / "d" / "1.jsonl", f"{LINE}\nnope")
    with pytest.raises(ValueError, match=r"1.jsonl:2: not JSON"):
        read(tmp_path / "d")


def test_a_colon_that_could_mean_two_things_is_refused(tmp_path):
    write(tmp_path / "a.jsonl", LINE)
    with pytest.raises(ValueError, match="a .jsonl file has no splits"):
        read(f"{tmp_path}/a.jsonl:train")
    write(tmp_path / "d:train" / "a.jsonl", LINE)
    assert read(f"{tmp_path}/d:train") == TWO[:1]
    write(tmp_path / "d" / "train.jsonl", LINE)
    with pytest.raises(ValueError, match="both .* exist; rename one"):
        read(f"{tmp_path}/d:train")


@pytest.mark.parametrize(
    "name", ["gone.jsonl", "./gone", "/gone/away", "gone.parquet", "gone.csv", "~/gone.json:train", "a b"]
)
def test_a_path_that_is_not_there_is_no_name_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        list(rows(name))


def hub(monkeypatch, version="5.2.0", error=None):
    """A stand-in for `datasets` that records how it was called."""
    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        if error is not None:
            raise error
        return [ROW]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __version__=version))
    return calls


@pytest.mark.parametrize(
    ("source", "args", "split"),
    [
        ("openai/gsm8k/main:train", ("openai/gsm8k", "main"), "train"),
        ("openai/gsm8k/main", ("openai/gsm8k", "main"), "train"),
        ("org/data:test[:100]", ("org/data", None), "test[:100]"),
        ("org/data", ("org/data", None), "train"),
        ("gsm8k", ("gsm8k", None), "train"),
    ],
)
def test_a_name_on_the_hub_may_give_its_config_and_split(monkeypatch, tmp_path, source, args, split):
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch)
    assert list(rows(source)) == [(f"{source}: row 1", ROW)]
    assert calls == [(args, {"split": split})]


def test_data_never_bring_code_that_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    calls = hub(monkeypatch, version="3.6.0")
    list(rows("org/data"))
    assert calls[0][1] == {"split": "train", "trust_remote_code": False}


def test_what_the_hub_says_is_one_line_with_the_way_to_name_a_config(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    hub(monkeypatch, error=RuntimeError("Config name is missing.\nPlease pick one among ['main', 'socratic']"))
    with pytest.raises(
        ValueError, match="Please pick one among .* a config is named as openai/gsm8k/CONFIG:train"
    ) as raised:
        list(rows("openai/gsm8k"))
    assert "\n" not in str(raised.value)


def test_a_reader_that_is_not_installed_is_one_line(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.parquet", b"PAR1")
    for module, source, named in (("pyarrow.parquet", "a.parquet", "pip install pyarrow"),
                                  ("datasets", "org/data", "pip install datasets")):  # fmt: skip
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(ValueError, match=f"task.train: {source}: .*{named}") as raised:
            build_task(TaskConfig(name="file", train=source))
        assert "\n" not in str(raised.value)


def test_tables_read_like_text(tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    monkeypatch.setitem(sys.modules, "datasets", None)  # local files do without
    parquet.write_table(pa.Table.from_pylist([VERL, VERL]), tmp_path / "a.parquet", row_group_size=1)
    assert read(tmp_path / "a.parquet", "prompt", "reward_model.ground_truth") == [(VERL["prompt"], "4")] * 2
    parquet.write_table(pa.table({"prompt": ["one", None], "answer": [1.0, 2.0]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="b.parquet: row 2: no 'prompt'"):
        read(tmp_path / "b.parquet")
    parquet.write_table(pa.table({"prompt": ["one"], "answer": [float("nan")]}), tmp_path / "c.parquet")
    with pytest.raises(ValueError, match="c.parquet: row 1: 'answer' is nan"):
        read(tmp_path / "c.parquet")
    write(tmp_path / "d.parquet", b"not parquet at all")
    with pytest.raises(ValueError, match="d.parquet: not parquet"):
        read(tmp_path / "d.parquet")


def saved(folder, *tables):
    """What `Dataset.save_to_disk` writes: arrow streams and a state.json that lists them."""
    pa = pytest.importorskip("pyarrow")
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(tables):05d}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables):
        with pa.ipc.new_stream(str(folder / name), pa.Table.from_pylist(table).schema) as file:
            file.write_table(pa.Table.from_pylist(table))
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def test_saved_datasets_are_read_without_datasets_and_ask_for_their_split(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    two = {"prompt": "two", "answer": "2"}
    assert read(saved(tmp_path / "one", [ROW], [two])) == TWO
    saved(tmp_path / "dict" / "train", [ROW, two])
    saved(tmp_path / "dict" / "test", [two])
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(f"{tmp_path}/dict:test") == TWO[1:]
    with pytest.raises(ValueError, match="holds several splits; choose one of 'train', 'test' as .*dict:split"):
        read(tmp_path / "dict")
    with pytest.raises(ValueError, match="no split 'valid' in it"):
        read(f"{tmp_path}/dict:valid")
    state = tmp_path / "one" / "state.json"
    state.write_text('{"_data_files": [{"filename": "../dict/train/data-00000-of-00001.arrow"}]}')
    with pytest.raises(ValueError, match="names a file outside the folder"):
        read(tmp_path / "one")


def test_numpy_cells_are_plain_python():
    import numpy as np

    from flowrl_kernels.trainer.tasks.dataset import plain

    got = plain({"a": np.array([{"role": "user"}], dtype=object), "b": np.float32(0.5), "c": [np.int64(3)]})
    assert got == {"a": [{"role": "user"}], "b": 0.5, "c": [3]}
    assert type(got["c"][0]) is int


@pytest.mark.parametrize(
    ("reward", "answer", "message"),
    [
        ("", ["1"], r"problem 1 of task.train must be text or a number for task.reward = 'exact'"),
        ("math", {"a": 1}, r"must be text or a number for task.reward = 'math'"),
        ("countdown", "15", r'must be \{"numbers"'),
        ("countdown", {"numbers": ["a"], "target": 3}, r'must be \{"numbers"'),
    ],
)
def test_answers_that_the_reward_cannot_compare_are_refused_at_the_start(tmp_path, reward, answer, message):
    good = {"numbers": [1, 2], "target": 3} if reward == "countdown" else "1"
    rows = [{"prompt": "x", "answer": good}, {"prompt": "x", "answer": answer}]
    file = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=message):
        build_task(TaskConfig(name="file", train=str(file), reward=reward))
