"""The distance to the optimum: of the row that is trained, in its units, by the tokenizer's tokens."""

import math

import pytest
import tiny
import torch

from flowrl_kernels.trainer import config_file, loop, measure, objective
from flowrl_kernels.trainer.config import Config

START = tiny.flags("run.steps 0  warm.steps 3  warm.batch 8  eval.exact True  eval.problems 2  checkpoint.export True")


def final(tmp_path, *args):
    folders = ["--run.dir", str(tmp_path / "run"), "--run.cache", str(tmp_path.parent / "cache")]
    return loop.train(config_file.override(Config(), [*tiny.SMALL, *START, *folders, *args]))


def partitions(folder, a, beta):
    """log Z of a (log pi - log ref) = beta r - log Z, by listing: a log sum ref exp(beta r / a), 2 problems."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "final").eval()
    ids = {char: i for i, char in enumerate("0123456789+=", 2)}
    answers = [f"{i}+{j}+{k}" for i in range(10) for j in range(10) for k in range(10)]
    rows = torch.tensor([[ids[c] for c in text] + [1] for text in answers])  # [1000, 6]
    out = []
    for total in (4, 5):
        prompt = torch.tensor([[ids[c] for c in f"{total:02d}="]]).expand(1000, -1)
        with torch.no_grad():
            logp = model(input_ids=torch.cat([prompt, rows], 1)).logits[:, 2:-1].double().log_softmax(-1)
        listed = logp.gather(-1, rows[..., None])[..., 0].sum(-1).exp()  # [1000]
        right = torch.tensor([sum(map(int, text.split("+"))) == total for text in answers])
        good = float(listed[right].sum())
        out.append(a * math.log(good * math.exp(beta / a) + 1.0 - good))
    return out


@pytest.mark.parametrize(("preset", "a", "beta"), [("tb", 1.0, 1.0), ("tb", 1.0, 3.0), ("agro", 0.1, 1.0)])
def test_log_z_and_the_kl_of_a_row_with_a_scale_are_its_own(tmp_path, preset, a, beta):
    got = final(tmp_path, "--algorithm.preset", preset, "--algorithm.beta", str(beta))
    want = partitions(tmp_path / "run", a, beta)
    assert got["log_z_exact"] == pytest.approx(sum(want) / 2, rel=1e-4)
    if preset == "tb":  # learned, and 0 before the first step
        assert got["log_z_error"] == pytest.approx(sum(want) / 2, rel=1e-4)
    # at the start policy = ref, so KL = sum ref (log ref - log optimum) = (log Z - beta E r) / a
    right = [(math.exp(z / a) - 1) / (math.exp(beta / a) - 1) for z in want]
    kl = [(z - beta * p) / a for z, p in zip(want, right)]
    assert got["exact_kl"] == pytest.approx(sum(kl) / 2, rel=1e-3)


@pytest.mark.parametrize(
    "args",
    [["qrpo"], ["release_old_anchor"], ["release_no_log_z"], ["tb_ppo_style"], ["token_log_z_beta30"], ["powerflow"],
     ["paper", "--algorithm.log_z", "none"]],
)  # fmt: skip
def test_a_row_whose_optimum_is_not_known_has_no_distance_to_it(tmp_path, args):
    got = final(tmp_path, "--algorithm.preset", *args)
    assert "exact_accuracy" in got
    assert not {"exact_kl", "log_z_exact", "log_z_error"} & got.keys()


def test_baselines_are_measured_against_the_papers_optimum():
    for name in ("grpo", "ppo", "flowrl"):
        assert objective.has_optimum(tiny.config(algorithm={"name": name}))


def test_a_responses_length_is_counted_in_the_tokenizers_tokens(monkeypatch, tmp_path):
    """A tokenizer that reads "+" and the digit after it as one: 3 tokens and the end, where there are 5 characters."""
    seen = []
    exact = measure.exact
    monkeypatch.setattr(
        measure, "exact", lambda *a, **k: seen.append(k["tokens"]) or exact(*a, **k | {"cfg": k["cfg"]})
    )
    final(tmp_path)
    assert seen[-1]("3+4+5") == 6

    class Pairs:
        def __call__(self, text, add_special_tokens):
            assert not add_special_tokens
            return {"input_ids": [text[0], *(text[i : i + 2] for i in range(1, len(text), 2))]}

    counted = seen[-1]
    cell = next(c for c in counted.__closure__ if hasattr(c.cell_contents, "text"))
    cell.cell_contents.text.tokenizer = Pairs()
    assert counted("3+4+5") == 4
