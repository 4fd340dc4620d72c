"""The listed tasks are exact, and the optimum that a method states is where its gradient is zero."""

import pytest
import torch

from benchmarks.evidence import learn, tasks
from benchmarks.evidence.rows import ROWS

SMALL = {
    "sums": tasks.sums_of("sums", "0123", (3,), (4, 6), 5.0),
    "lengths": tasks.sums_of("lengths", "123", (2, 3), (4, 5), 5.0),
}


def expected_gradient(task, row, dial, log_ref, log_p, log_z):
    """Norm of the mean gradient of a row's loss, under the policy with log-probabilities log_p [P, R].

    Over every string by its probability or, where a response is judged beside others, every pair as a group. A row that
    learns log Z has one gradient for each string, and sees all of them as one group (MARA's likeliest is the prompt's).
    """
    table = torch.stack([tasks.table_of(task.tree, p) for p in log_p]).requires_grad_()
    prompts, strings = log_p.shape
    first = torch.arange(strings)
    which, size = (first, 1) if row.log_z else (torch.cartesian_prod(first, first).reshape(-1), 2)
    reference = tasks.log_table(task.tree, tasks.table_of(task.tree, log_ref)).repeat(1, prompts, 1, 1)
    here = learn.Setting(task, log_ref[None], reference, [torch.Generator()], None, None).with_samples(len(which))
    which = which.repeat(prompts)
    steps = tasks.log_table(task.tree, table)[None]
    value = torch.rand(1, prompts, len(task.tree.child), dtype=torch.float64, generator=here.draws[0])
    batch = learn.batch_of(here, steps, log_z[None], value, learn.Drawn(which, torch.zeros(0)), True)
    if size == 2:
        batch = batch._replace(groups=torch.arange(len(which)) // 2, completed=lambda _: exact_values(task, batch))
    chance = log_p[here.prompt, which].exp().reshape(-1, size).prod(-1).repeat_interleave(size)
    (of_tokens,) = torch.autograd.grad(
        row.loss(batch, torch.full_like(batch.reward, dial)), batch.logp, retain_graph=True
    )
    (gradient,) = torch.autograd.grad(batch.logp, table, of_tokens * chance[:, None])
    return float(gradient.norm())


def exact_values(task, batch):
    """Mean reward from before each token on, from the strings' chances: [B, T]."""
    prompts = len(task.reward)
    samples = len(batch.answer) // prompts
    out = torch.zeros(batch.logp.shape, dtype=torch.float64)
    for prompt in range(prompts):
        mine = slice(prompt * samples, (prompt + 1) * samples)
        chance = dict(zip(batch.answer[mine].tolist(), batch.logp[mine].detach().sum(-1).exp().tolist()))
        below, total = {}, {}
        for which, p in chance.items():
            for i in range(len(task.texts[which]) + 1):
                prefix = task.texts[which][:i]
                total[prefix] = total.get(prefix, 0.0) + p
                below[prefix] = below.get(prefix, 0.0) + p * float(task.reward[prompt, which])
        for which in chance:
            text = task.texts[which]
            line = [below[text[:i]] / total[text[:i]] for i in range(len(text) + 1)]
            out[mine][batch.answer[mine] == which, : len(line)] = torch.tensor(line, dtype=torch.float64)
    return out


@pytest.mark.parametrize("name", [*tasks.TASKS, *SMALL])
def test_strings_have_the_probabilities_of_their_table_and_add_up_to_one(name):
    task = SMALL[name] if name in SMALL else tasks.TASKS[name]()
    reference = task.reference(3)
    logp = tasks.log_probs(task.tree, reference)
    assert float(logp.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    again = tasks.log_probs(task.tree, tasks.table_of(task.tree, logp))
    torch.testing.assert_close(again, logp, rtol=0, atol=1e-10)
    # by hand: at each prefix a softmax over what comes next in any of the strings
    text, prefixes, total = task.texts[7], {}, 0.0
    for other in task.texts:
        for i, letter in enumerate(other + "\n"):
            prefixes.setdefault(other[:i], {}).setdefault(letter)
    branching = [prefix for prefix, letters in prefixes.items() if len(letters) > 1]
    for i, letter in enumerate(text + "\n"):
        letters = list(prefixes[text[:i]])
        if len(letters) > 1:
            logits = reference[branching.index(text[:i]), : len(letters)]
            total += float(logits.log_softmax(-1)[letters.index(letter)])
    assert float(logp[7]) == pytest.approx(total)
    assert int(task.tree.length[7]) == len(text) + 1


@pytest.mark.parametrize("name", ["sums_of_any_length", "modes"])
def test_strings_are_sampled_as_often_as_the_policy_says(name):
    task = tasks.TASKS[name]()
    here = learn.setting_of(task, [3, 4], 20_000)
    drawn = learn.sample(here, here.reference)
    logp = torch.stack([tasks.log_probs(task.tree, task.reference(seed)) for seed in (3, 4)])
    for cell in (0, 1):
        share = torch.bincount(drawn.which[here.cell == cell], minlength=len(task.texts)).double()
        share, p = share / share.sum(), logp[cell].exp()
        count = 20_000 * len(task.reward)
        assert float(((share - p).square() * count / p).sum()) < len(p) + 6 * (2 * len(p)) ** 0.5  # chi-square
    torch.testing.assert_close(drawn.old.sum(-1), logp[here.cell, drawn.which])


@pytest.mark.parametrize("task", SMALL)
@pytest.mark.parametrize("name", [name for name, row in ROWS.items() if row.own is not None])
def test_a_method_stands_still_at_the_optimum_it_states_and_nowhere_near(name, task):
    task, row = SMALL[task], ROWS[name]
    log_ref = tasks.log_probs(task.tree, task.reference(5))
    dial = row.default if not name.startswith("paper") else 0.7
    own = row.own(task, log_ref, dial)
    assert float((own.exp().sum(-1) - 1).abs().max()) < 1e-9
    log_z = row.log_z(task, log_ref, dial) if row.log_z else torch.zeros(len(task.reward), dtype=torch.float64)
    still, moved = (
        expected_gradient(task, row, dial, log_ref, log_p, log_z) for log_p in (own, log_ref.expand_as(task.reward))
    )
    assert still < 1e-6 * moved
    assert moved > 1e-6


def test_cells_that_train_together_get_the_numbers_they_get_alone(monkeypatch):
    monkeypatch.setitem(tasks.TASKS, "lengths", lambda: SMALL["lengths"])
    for method in ("dapo", "top_entropy", "tba", "vine", "ppo_kl_in_loss", "distinct_alone"):
        dials = ROWS[method].values
        cells = [learn.Cell("lengths", method, d, lr, seed, 8, 8) for d, lr, seed in zip(dials, (0.1, 0.3), (1, 2))]
        together = learn.run_together(cells)
        for cell, out in zip(cells, together):
            assert learn.run(cell)["kl_stated"] == pytest.approx(out["kl_stated"], rel=1e-9), method


def test_length_normalisation_with_graded_rewards_leaves_one_answer_where_the_stated_target_keeps_many():
    task = tasks.modes()
    count = float(task.right.sum())
    for seed in range(5):
        log_ref = tasks.log_probs(task.tree, task.reference(seed))
        stated = tasks.tilted(log_ref, task.reward, task.beta)
        own = tasks.tilted_by_length(log_ref, task.reward, task.tree.length.double(), task.beta)
        assert tasks.figures(task, stated, stated, None)["coverage"] * count > 5
        assert tasks.figures(task, own, stated, None)["coverage"] * count < 1.1


def test_a_short_run_gets_most_of_the_way_to_the_stated_target():
    cell = learn.Cell("modes", "length_true", 10.0, 0.1, 0, 120, 64)
    task = tasks.modes()
    log_ref = tasks.log_probs(task.tree, task.reference(0))
    start = float(tasks.kl(log_ref, tasks.tilted(log_ref, task.reward, task.beta)).mean())
    out = learn.run(cell)
    assert out["kl_stated"] < 0.25 * start
    assert learn.run(cell)["kl_stated"] == out["kl_stated"], "another seed was drawn"
