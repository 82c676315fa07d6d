"""Accuracy of classes and of clusters, against brute force; what is no class is refused."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import oracles
import pytest

from elbozoo.inference import accuracy, class_probabilities, cluster_accuracy
from elbozoo.inference.errors import InvalidArgument
from elbozoo.zoo import VAE


def best_match(clusters: np.ndarray, labels: np.ndarray, num: int) -> float:
    """The best accuracy over all renamings of the clusters."""
    return max((np.array(names)[clusters] == labels).mean() for names in itertools.permutations(range(num)))


@pytest.mark.parametrize(("num_clusters", "num_classes"), [(4, 4), (5, 3), (3, 5), (1, 2)])
def test_cluster_accuracy_is_the_best_permutation(num_clusters: int, num_classes: int) -> None:
    rng = np.random.default_rng(num_clusters)
    for _ in range(10):
        labels = rng.integers(0, num_classes, 40)
        clusters = np.where(rng.random(40) < 0.5, (labels * 7 + 2) % num_clusters, rng.integers(0, num_clusters, 40))
        want = best_match(clusters, labels, max(num_clusters, num_classes))
        assert cluster_accuracy(clusters, labels) == pytest.approx(want)
        assert cluster_accuracy(np.eye(num_clusters)[clusters], labels) == pytest.approx(want)


def test_accuracy_by_hand() -> None:
    assert accuracy(np.array([[0.2, 0.8], [0.6, 0.4], [0.9, 0.1]]), [1, 0, 1]) == pytest.approx(2 / 3)
    assert accuracy(np.array([1, 0, 2]), [1, 0, 2]) == 1.0


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], r"labels must be 3 whole numbers from 0; got shape \(2,\)"),
        ([0, 1, -1], "labels must be 3 whole numbers from 0; got"),
        ([0, 1, 0.5], "labels must be 3 whole numbers from 0; got"),
    ],
)
@pytest.mark.parametrize("measure", [accuracy, cluster_accuracy])
def test_labels_that_are_none_are_refused(measure: Any, labels: list, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        measure(np.array([0, 1, 1]), labels)


def test_clusters_that_are_none_are_refused() -> None:
    with pytest.raises(InvalidArgument, match="clusters must be 2 whole numbers from 0"):
        cluster_accuracy(np.array([0, -1]), [0, 1])


def test_a_site_that_is_not_categorical_is_refused(engine: str) -> None:
    spec = VAE(3, 2)
    made = getattr(spec, engine)()
    if engine == "numpyro":
        made = made.with_weights(spec.pyro().weights)
    with pytest.raises(InvalidArgument, match="site must be a categorical site of the guide; got 'y'. It has none"):
        class_probabilities(made, np.zeros((2, 3)))


def test_several_variables_a_datum_are_refused(engine: str) -> None:
    lib = oracles.library(engine)

    def guide(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("y", lib.dist.Categorical(logits=lib.array(np.zeros((2, 3)))).to_event(1))

    def model(x: Any) -> None:
        with lib.plate("data", len(x), dim=-1):
            lib.sample("y", lib.dist.Categorical(logits=lib.array(np.zeros((2, 3)))).to_event(1))
            lib.sample("x", lib.dist.Normal(lib.array(0.0), 1.0), obs=x)

    with pytest.raises(InvalidArgument, match=r"site 'y' must be one variable a datum; got event shape \(2,\)"):
        class_probabilities(oracles.wrapped(engine, model, guide), np.zeros(4))
