"""The predicted times: counted from the committed machine code, marked as predicted, and what they must reach."""

import json

import pytest

pytest.importorskip("triton", reason="triton is not installed: its tile table is not read")
from benchmarks import model

HEADS = {"qwen2.5-7b": 152064, "llama-3.1-8b": 128256}


@pytest.fixture(scope="module")
def made():
    return model.document()


def test_the_committed_prediction_is_what_the_committed_counts_give(made):
    assert json.loads(model.OUT.read_text()) == json.loads(json.dumps(made)), "run `python -m benchmarks.model --write`"
    text = model.PAGE.read_text()
    assert text == model.page(text, made), "run `python -m benchmarks.model --write`"
    headings = [line for line in text.splitlines() if line.startswith("## ")]
    assert len(headings) == 3
    assert all("(predicted, " in line for line in headings)
    assert "**Predicted, not measured.**" in text


def test_the_forward_of_the_7b_head_is_predicted_at_655_and_that_of_the_last_release_where_it_was(made):
    [row] = [r for r in made["forward"] if r["head"] == "qwen2.5-7b" and r["n"] == 8192]
    before, _, now = row["tflops"]
    assert 630 < before < 640
    assert now >= 655


def test_the_busiest_program_is_within_two_in_a_hundred_of_an_even_share(made):
    for row in made["forward"]:
        least = {"qwen2.5-7b": 1024, "qwen2.5-32b": 1024, "llama-3.1-8b": 4096}.get(row["head"], 1024)
        if row["n"] >= least:
            assert row["busy"] >= 0.98, row


def test_evenness_is_counted_as_the_programs_take_their_items():
    # 2 row blocks of 5 tiles, splits of 2, 4 programs: items cost 2 2 2 2 | 1 1 unpadded, 2 each padded
    assert model.waves(256, 5 * 256, 2, False, 64, 4) == pytest.approx(10 / 4 / 3)
    assert model.waves(256, 5 * 256, 2, True, 64, 4) == pytest.approx(10 / 4 / 4)


def test_every_case_for_a_gpu_has_a_prediction_or_none_and_a_place_for_what_is_measured(made):
    cases = {entry["case"]: entry for entry in made["cases"]}
    assert set(cases) == {name for name, case in model.CASES.items() if case.device == "cuda"}
    for name, entry in cases.items():
        for card in ("H100", "H200"):
            assert (entry[card] is None) == (model.CASES[name].epsilon > 0)
            if entry[card] is not None:
                assert 0 < entry[card]["forward"] <= entry[card]["step"]
                ideal = entry["flops"]["step"] / 795e12 + entry["bytes"]["forward"] / 8e12
                assert ideal < entry[card]["step"] + 1e-9
        assert entry["measured_s"] == {}


def test_a_measured_case_stands_beside_its_prediction(tmp_path, monkeypatch):
    entry = {"status": "ok", "forward": {"median_s": 0.02}, "step": {"median_s": 0.05}}
    case = {"name": "qwen2.5-7b-8k", "implementations": {"ours-triton": entry, "eager": {**entry}}}
    (tmp_path / "a.json").write_text(json.dumps({"machine": {"gpu": {"name": "A card"}}, "cases": [case]}))
    (tmp_path / "b.json").write_text(json.dumps({"machine": {"gpu": None}, "cases": [case]}))
    monkeypatch.setattr(model, "RESULTS", tmp_path)
    assert model.measured("qwen2.5-7b-8k") == {"A card: forward": 0.02, "A card: step": 0.05}
    assert model.measured("logprob-8k") == {}
