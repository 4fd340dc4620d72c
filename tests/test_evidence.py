"""The listed tasks are exact, and the optimum that a method states is where its gradient is zero."""

import dataclasses

import pytest
import torch

from benchmarks.evidence import learn, tasks
from benchmarks.evidence.rows import ROWS

SMALL = {
    "sums": tasks.sums_of("sums", "0123", (3,), (4, 6), 5.0),
    "lengths": tasks.sums_of("lengths", "123", (2, 3), (4, 5), 5.0),
}


def whole(task, log_p, log_z):
    """Every string once, as a batch, under the policy with log-probabilities log_p [P, R]."""
    table = torch.stack([tasks.table_of(task.tree, p) for p in log_p]).requires_grad_()
    prompts, strings = log_p.shape
    prompt = torch.arange(prompts).repeat_interleave(strings)
    which = torch.arange(strings).repeat(prompts)
    return table, learn.batch_of(task, table, log_z, (which, prompt, torch.zeros(0)), True)


@pytest.mark.parametrize("name", [*tasks.TASKS, *SMALL])
def test_strings_have_the_probabilities_of_their_table_and_add_up_to_one(name):
    task = SMALL[name] if name in SMALL else tasks.TASKS[name]()
    logp = tasks.log_probs(task.tree, task.reference)
    assert float(logp.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    again = tasks.log_probs(task.tree, tasks.table_of(task.tree, logp))
    torch.testing.assert_close(again, logp, rtol=0, atol=1e-10)
    text = task.texts[7]
    step, at = tasks.log_table(task.tree, task.reference), 0
    letters = sorted({letter for text in task.texts for letter in text})
    total = 0.0
    for token in [*map(letters.index, text), len(letters)]:
        total += float(step[at, token])
        at = int(task.tree.child[at, token])
    assert float(logp[7]) == pytest.approx(total)
    assert int(task.tree.length[7]) == len(text) + 1


@pytest.mark.parametrize("task", SMALL)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.own is not None])
def test_a_method_stands_still_at_the_optimum_it_states_and_nowhere_near(name, task):
    task, row = SMALL[task], ROWS[name]
    log_ref = tasks.log_probs(task.tree, task.reference)
    dial = row.default if name != "paper" else 0.7
    cell = dataclasses.replace(learn.Cell("", name, dial, 0.0, 0))
    log_z = torch.zeros(len(task.reward), dtype=torch.float64)
    if row.learns_log_z:
        log_z = learn.true_log_z(task, log_ref, cell)
    sizes = []
    for log_p in (row.own(task, log_ref, dial), log_ref.expand_as(task.reward)):
        table, batch = whole(task, log_p, log_z)
        (gradient,) = torch.autograd.grad(row.loss(batch, dial), table)
        sizes.append(float(gradient[task.tree.allowed.expand_as(gradient)].norm()))
    assert sizes[0] < 1e-7 * sizes[1]
    assert sizes[1] > 1e-3


def test_length_normalisation_with_graded_rewards_leaves_one_answer_where_the_stated_target_keeps_many():
    task = tasks.modes()
    log_ref = tasks.log_probs(task.tree, task.reference)
    stated = tasks.tilted(log_ref, task.reward, task.beta)
    own = tasks.tilted_by_length(log_ref, task.reward, task.tree.length.double(), task.beta)
    count = float(task.right.sum())
    assert tasks.figures(task, stated, stated, None)["coverage"] * count > 20
    assert tasks.figures(task, own, stated, None)["coverage"] * count < 1.1


def test_a_short_run_gets_most_of_the_way_to_the_stated_target():
    start, cell = 0.0, learn.Cell("modes", "length_true", 10.0, 0.1, 0, 120, 64)
    task = tasks.modes()
    log_ref = tasks.log_probs(task.tree, task.reference)
    start = float(tasks.kl(log_ref, tasks.tilted(log_ref, task.reward, task.beta)).mean())
    out = learn.run(cell)
    assert out["kl_stated"] < 0.25 * start
    assert learn.run(cell)["kl_stated"] == out["kl_stated"], "another seed was drawn"
