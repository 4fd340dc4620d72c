"""Diversity, a judge and a rating: against enumeration, grids, the jackknife and simulation."""

import http.server
import itertools
import json
import math
import pickle
import random
import statistics
import threading

import numpy as np
import pytest

from flowrl_kernels.trainer.config import TaskConfig
from flowrl_kernels.trainer.rollout.faults import EngineError
from flowrl_kernels.trainer.suites import diversity, file, forms, judge, measures, rating
from flowrl_kernels.trainer.suites.diversity import Spread
from flowrl_kernels.trainer.suites.figures import Outcome
from flowrl_kernels.trainer.suites.paths import clusters
from flowrl_kernels.trainer.suites.syntax import normal_form
from flowrl_kernels.trainer.tasks import Problem, build_task
from flowrl_kernels.trainer.tasks.sums import Sums

# ------------------------------------------------------------------------------------------------ rating

DIFFICULTIES = [800.0, 1200.0, 1500.0, 1500.0, 1900.0, 2400.0]
RATES = [1.0, 0.75, 0.5, 1.0, 0.25, 0.0]


def test_the_rating_is_the_highest_point_of_the_likelihood_and_its_error_is_near_the_jackknifes():
    grid = np.arange(0.0, 3000.0, 0.01)[:, None]
    chance = 1 / (1 + 10 ** ((np.array(DIFFICULTIES) - grid) / 400))
    rates = np.array(RATES)
    likelihood = (rates * np.log(chance) + (1 - rates) * np.log(1 - chance)).sum(1)
    found = rating.fit(DIFFICULTIES, RATES)
    assert found.rating == pytest.approx(grid[likelihood.argmax(), 0], abs=0.02)
    many = random.Random(0).choices(list(zip(DIFFICULTIES, RATES)), k=60)
    left = [rating.fit(*zip(*(many[:i] + many[i + 1 :]))).rating for i in range(60)]
    jackknife = math.sqrt(59 / 60 * sum((x - statistics.mean(left)) ** 2 for x in left))
    assert rating.fit(*zip(*many)).se == pytest.approx(jackknife, rel=0.03)


def test_the_ratings_error_is_what_it_scatters_by_over_fresh_problems():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(300):
        levels = rng.uniform(1000, 2200, 40)
        chance = 1 / (1 + 10 ** ((levels - 1600) / 400))
        found.append(rating.fit(levels.tolist(), (rng.binomial(4, chance) / 4).tolist()))
    assert np.mean([f.rating for f in found]) == pytest.approx(1600, abs=8)
    assert np.mean([f.se for f in found]) == pytest.approx(np.std([f.rating for f in found]), rel=0.1)


def test_all_or_nothing_solved_has_no_rating_but_a_bound():
    best = rating.fit([1500.0], [1.0])
    assert best.rating is None
    assert best.at_least == pytest.approx(1500 + 400 * math.log10(0.05 / 0.95))  # solved with a chance of .05
    worst = rating.fit([1500.0], [0.0])
    assert worst.rating is None
    assert worst.at_most == pytest.approx(1500 - 400 * math.log10(0.05 / 0.95))
    many = rating.fit(DIFFICULTIES, [1.0] * 6).at_least
    assert math.prod(rating.solved(many, d) for d in DIFFICULTIES) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="a rating for every result"):
        rating.fit([], [])


def test_ratings_and_percentiles_come_from_the_users_own_files(tmp_path):
    data = tmp_path / "problems.jsonl"
    data.write_text('{"r": 800}\n{"r": null}\n{"r": "1200"}\n{"r": 3}\n')
    assert rating.of_problems(str(data), "r", 3) == [800.0, None, 1200.0]
    with pytest.raises(ValueError, match="no row of .* has a number in 'x'"):
        rating.of_problems(str(data), "x", 3)
    users = tmp_path / "users.csv"
    users.write_text("rating,count\n1000,30\n1500,50\n2000,20\n")
    people = rating.population(file.Percentile(str(users), "a synthetic contest"))
    assert [people.below(r) for r in (999, 1000, 1500, 1501, 3000)] == [0, 0, 30, 80, 100]
    told = rating.told(rating.fit(DIFFICULTIES, RATES), people, "a synthetic contest")
    assert told["percentile"] == 80
    assert told["percentile_source"] == "a synthetic contest"
    users.write_text("rating,count\n1000,-3\n")
    with pytest.raises(ValueError, match="percentile: .*users.csv:2"):
        rating.population(file.Percentile(str(users), "x"))


# ------------------------------------------------------------------------------------------------ how many, how even


def test_distinct_at_k_is_the_mean_over_all_subsets_and_with_one_solution_pass_at_k():
    labels = ["a", "a", "b", None, None, "c", "a"]
    for k in range(1, 8):
        subsets = [len(set(s) - {None}) for s in itertools.combinations(labels, k)]
        assert diversity.distinct_at_k(Spread.of(labels), k) == pytest.approx(statistics.mean(subsets))
    pairs = [x == y for x, y in itertools.combinations(["a", "a", "b", "c", "a"], 2)]
    assert diversity.collision(Spread.of(labels).counts) == pytest.approx(statistics.mean(pairs))
    shares = np.array([3, 1, 1]) / 5
    assert diversity.entropy_number(Spread.of(labels).counts) == pytest.approx(math.exp(-(shares @ np.log(shares))))
    assert diversity.entropy_number([2, 2, 2]) == pytest.approx(3)
    with pytest.raises(ValueError, match="wanted 1 to 7"):
        diversity.distinct_at_k(Spread.of(labels), 8)


def test_inverse_simpson_does_not_grow_with_the_number_of_responses_where_the_entropy_number_does():
    rng = np.random.default_rng(0)
    chances = np.array([0.5, 0.3, 0.2])

    def told(responses):
        drawn = [Spread.of([str(x) for x in rng.choice(3, responses, p=chances)]) for _ in range(1500)]
        return diversity.figures(drawn, [2])

    few, many = told(3), told(24)
    assert few["simpson"].value == pytest.approx(1 / (chances**2).sum(), rel=0.05)
    assert many["simpson"].value == pytest.approx(1 / (chances**2).sum(), rel=0.02)
    assert few["entropy"].value < 0.8 * many["entropy"].value
    assert few["distinct@2"].value == pytest.approx(2 - (chances**2).sum(), abs=0.03)


def test_the_bootstrap_interval_is_near_the_normal_one_and_the_same_each_time():
    rng = np.random.default_rng(3)
    spreads = [Spread.of([str(x) for x in rng.integers(rng.integers(1, 6), size=8)]) for _ in range(200)]
    found = diversity.figures(spreads, [4])
    each = [diversity.distinct_at_k(spread, 4) for spread in spreads]
    half = 1.96 * statistics.stdev(each) / math.sqrt(200)
    assert found["distinct@4"].value == pytest.approx(statistics.mean(each))
    assert found["distinct@4"].low == pytest.approx(statistics.mean(each) - half, abs=0.15 * half)
    assert found["distinct@4"].high == pytest.approx(statistics.mean(each) + half, abs=0.15 * half)
    assert diversity.figures(spreads, [4]) == found
    assert found["simpson"].low < found["simpson"].value < found["simpson"].high


def test_what_cannot_be_said_is_none_and_not_a_number():
    alone = diversity.figures([Spread(4, (1, 1)), Spread(4, ())], [2, 8], [2, 4])
    assert alone["simpson"].value is None  # no two were alike: no upper bound
    assert alone["entropy"].problems == 1
    assert alone["members"].value == 1
    assert "distinct@8" not in alone
    assert alone["covered@2"].value == pytest.approx(1.0 / 2 / 2)
    assert diversity.figures([Spread(4, ())], [])["entropy"].value is None


# ------------------------------------------------------------------------------------------------ what is the same

SAME = [
    ("def f(a, b):\n    return a + b", "def g(x, y):\n    # adds\n    return x + y"),
    ("def f(a):\n    'doc'\n    return a", "def f(a: int) -> int:\n    return a"),
    ("import math\ndef f(n):\n    return math.sqrt(n)", "import math as m\nimport os\ndef f(k):\n    return m.sqrt(k)"),
    ("x: int = 3\nprint(x)", "y = 3\nprint(y)"),
    ("s = 0\nfor i in range(3):\n    s += i", "t = 0\nfor j in range(3):\n    t += j"),
    ("print([i for i in range(3)])", "print([k for k in range(3)])"),
    ("def f():\n    i = 1\n    return i\ndef g():\n    i = 2\n    return i",
     "def f():\n    i = 1\n    return i\ndef g():\n    j = 2\n    return j"),
    ("try:\n    pass\nexcept OSError as e:\n    print(e)", "try:\n    pass\nexcept OSError as why:\n    print(why)"),
    ("n = 0\ndef f():\n    global n\n    n = 1", "m = 0\ndef f():\n    global m\n    m = 1"),
    ("f = lambda a, *b: a", "f = lambda x, *y: x"),
]  # fmt: skip
DIFFERENT = [
    ("def f(a, b):\n    return a + b", "def f(a, b):\n    return b + a"),
    ("def f(n):\n    return sum(n)", "def f(n):\n    return max(n)"),
    ("import math\nprint(math.sqrt(2))", "import cmath as math\nprint(math.sqrt(2))"),
    ("print(1)", "print(2)"),
    ("for i in x:\n    print(i)", "while x:\n    print(i)"),
    ("def f(a):\n    return a.b", "def f(a):\n    return a.c"),
    ("n = 0\ndef f():\n    global n\n    n = 1", "n = 0\ndef f():\n    n = 1"),
    ("def f(a):\n    return a(sorted)", "def f(sorted):\n    return sorted(sorted)"),
]


def test_programs_that_differ_in_names_and_layout_alone_have_one_form():
    for a, b in SAME:
        assert normal_form(a) == normal_form(b) is not None, a
    for a, b in DIFFERENT:
        assert normal_form(a) != normal_form(b), a
    for broken in ("def f(:", "(" * 5000, "a\0b", "1 + " * 30000 + "1"):
        assert normal_form(broken) is None


def test_final_expressions_are_one_where_they_are_written_otherwise():
    for a, b in ((r"\boxed{\frac12}", "The answer is 0.5"), (r"\boxed{x + 1}", r"\boxed{x+1}"),
                 (r"\boxed{3, 5}", r"\boxed{5 \text{ and } 3}"), (r"\boxed{(1,2)}", r"\boxed{( 1 , 2 )}")):  # fmt: skip
        assert forms.final_form(a) == forms.final_form(b) is not None
    for a, b in ((r"\boxed{(1,2)}", r"\boxed{[1,2)}"), (r"\boxed{1}", r"\boxed{2}"), (r"\boxed{5 cm}", r"\boxed{5 m}")):
        assert forms.final_form(a) != forms.final_form(b)
    assert forms.final_form("I do not know.\nReally.") is None


def test_clusters_are_joined_by_mean_similarity_down_to_the_threshold_in_any_order():
    angles = np.radians([0, 5, 9, 90, 94, 180])
    vectors = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)

    def sets(order, threshold):
        owner = clusters(vectors[order], threshold)
        return {frozenset(int(order[i]) for i, o in enumerate(owner) if o == cluster) for cluster in owner}

    rng = np.random.default_rng(0)
    for order in (np.arange(6), rng.permutation(6), rng.permutation(6)):
        assert sets(order, 0.9) == {frozenset({0, 1, 2}), frozenset({3, 4}), frozenset({5})}
        assert sets(order, math.cos(math.radians(4.5))) == {
            frozenset({1, 2}), frozenset({0}), frozenset({3, 4}), frozenset({5})
        }  # fmt: skip
        assert len(sets(order, 1.0)) == 6
        assert len(sets(order, -1.0)) == 1
    # 0-60-120: 60 is near both, but the mean of (0, 60) to 120 is -.0: no chain
    chain = np.stack([np.cos(np.radians([0, 60, 120])), np.sin(np.radians([0, 60, 120]))], 1)
    assert len(set(clusters(chain, 0.4))) == 2


def test_sums_counts_its_canonical_answers_among_right_ones_and_the_share_it_covers():
    task = Sums()
    problems = [p for p in task.problems("test") if p.answer in (4, 5)]
    texts = [["4+0+0", "4+0+0", "0+4+0", "9+9+9"], ["5+0+0", "x", "y", "z"]]
    outcomes = [
        Outcome(p.id, str(p.id), [bool(task.verify(p, t)) for t in row], [6] * 4, [True] * 4, row)
        for p, row in zip(problems, texts)
    ]
    suites = file.SuiteFile()
    measure = measures.ready(file.Suite(), suites, TaskConfig(), 2)
    found, labels = measures.take(measure, file.Suite(), task, problems, outcomes, measures.Cache(suites))
    figures = found["diversity"]["canonical"]
    assert figures["distinct@4"]["value"] == pytest.approx((2 + 1) / 2)
    assert figures["covered@4"]["value"] == pytest.approx((2 / 15 + 1 / 21) / 2)
    assert labels["canonical"][0][3] is None
    file_task = file.Suite(task=TaskConfig(name="file", reward="exact"))
    nothing = measures.ready(file_task, suites, file_task.task, 2)
    assert nothing.forms == ("canonical",)


def test_forms_that_a_task_cannot_have_and_packages_that_are_not_there_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="'syntax' is for task.reward = 'code'"):
        measures.ready(file.Suite(diversity=("syntax",)), file.SuiteFile(), TaskConfig(name="maths"), 1)
    paths = file.SuiteFile(paths=file.Paths(model=str(tmp_path)))
    with pytest.raises(ValueError, match="no config.json"):
        measures.ready(file.Suite(diversity=("paths",)), paths, TaskConfig(name="maths"), 1)
    with pytest.raises(ValueError, match="whose rows have a column 'rating'"):
        measures.ready(file.Suite(rating="rating"), file.SuiteFile(), TaskConfig(name="sums"), 1)


# ------------------------------------------------------------------------------------------------ a judge


@pytest.fixture
def grader():
    """An OpenAI-compatible server on this machine: what it was asked, and what it says next."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append((self.path, self.headers.get("Authorization"), body))
            status, text = self.server.says(body)
            data = json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}]}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.says = [], lambda body: (200, "4")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_judge_sees_the_start_of_each_response_and_what_is_no_grade_is_counted_apart(grader, tmp_path):
    (tmp_path / "key").write_text("secret\n")
    address = f"http://127.0.0.1:{grader.server_address[1]}"
    settings = file.Judge(address=address, model="judge-1", key_file=str(tmp_path / "key"), characters=5)
    grader.says = lambda body: (200, "4" if "first" in body["messages"][0]["content"] else "unsure")
    grades = judge.Asked(settings).grades([("the first", ["123456789", "abc"]), ("the second", ["x"])])
    assert grades == [4, None]
    path, key, body = next(asked for asked in grader.asked if "first" in str(asked))
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert (body["model"], body["temperature"]) == ("judge-1", 0)
    text = body["messages"][0]["content"]
    assert "Attempt 1: 12345...\nAttempt 2: abc\n" in text
    assert "6789" not in text
    told = judge.told(grades, settings)
    assert (told["grade"], told["unread"], told["problems"]) == (4, 1, 1)
    assert "secret" not in json.dumps(told)


def test_a_judge_that_refuses_ends_in_its_own_words(grader):
    grader.says = lambda body: (401, "no key")
    settings = file.Judge(address=f"http://127.0.0.1:{grader.server_address[1]}", model="m")
    with pytest.raises(EngineError, match="judge.address: .*answered 401"):
        judge.Asked(settings).grade("p", ["r"])


# ------------------------------------------------------------------------------------------------ sets of problems

SETS = [
    ({"ID": "2024-I-1", "Problem": "How?", "Solution": r"So \boxed{033}", "Answer": 33}, "How?", 33),
    ({"problem": "How?", "solution": r"First \boxed{1}, then \boxed{\frac{1}{2}}."}, "How?", r"\frac{1}{2}"),
    ({"question": "How?", "answer": "27.0", "url": "u"}, "How?", "27.0"),
    ({"problem": "How?", "solution": "Long.", "answer": "10", "level": 2, "unique_id": "x"}, "How?", "10"),
    ({"question": "How?", "final_answer": ["$2$"], "solution": ["s"], "context": None, "error": None}, "How?", "$2$"),
    ({"question": "How?", "final_answer": ["1", "2"], "is_multiple_answer": True}, "How?", "1, 2"),
    ({"question": "How?", "context": "Given.", "final_answer": ["1"]}, "Given.\n\nHow?", "1"),
    ({"question": "How?", "final_answer": ["3.1"], "error": "1e-1"}, "How?", {"answer": "3.1", "error": "1e-1"}),
    ({"prompt": [{"role": "user", "content": "How?"}], "reward_model": {"ground_truth": "7"}},
     [{"role": "user", "content": "How?"}], "7"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "prompt", "answer"), SETS, ids=range(len(SETS)))
def test_a_mathematics_set_is_read_by_the_columns_that_it_goes_round_with(tmp_path, row, prompt, answer):
    (tmp_path / "set.jsonl").write_text(json.dumps(row))
    task = build_task(TaskConfig(name="maths", test=str(tmp_path / "set.jsonl")))
    assert task.problems("test") == [Problem(0, prompt, answer)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "How?", "answer": 1}, "no problem or question or prompt in this row"),
        ({"problem": "How?", "solution": "ends"}, "no .* in a solution"),
        ({"question": "How?", "final_answer": ["1"], "image_1": "x"}, "the row has images"),
        ({"question": "Show", "final_answer": None, "question_type": "Theorem proof"}, "wants a proof"),
        ({"question": "How?", "final_answer": ["1"], "error": "much"}, "wanted an error"),
        ({"question": "How?", "answer": {"a": 1}}, "text or a number"),
    ],
)
def test_a_row_that_cannot_be_asked_is_named(tmp_path, row, said):
    (tmp_path / "set.jsonl").write_text("\n" + json.dumps(row))
    with pytest.raises(ValueError, match=rf"task.test: .*set.jsonl:2: .*{said}"):
        build_task(TaskConfig(name="maths", test=str(tmp_path / "set.jsonl")))


def test_a_rows_own_tolerance_takes_what_is_near_and_nothing_else(tmp_path):
    (tmp_path / "set.jsonl").write_text(json.dumps({"question": "How?", "final_answer": ["3.1"], "error": "0.1"}))
    task = build_task(TaskConfig(name="maths", test=str(tmp_path / "set.jsonl")))
    task = pickle.loads(pickle.dumps(task))  # as it travels to the reward workers
    assert not task.trusted
    problem = task.problems("test")[0]
    assert [task.verify(problem, rf"\boxed{{{x}}}") for x in ("3.1", "3.2", "3", "3.21", "x")] == [1, 1, 1, 0, 0]
