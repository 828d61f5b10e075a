"""Quality figures of a set of digits, as functions of arrays. Knows no generator.

Fréchet distance: Heusel et al. 2017 (arXiv:1706.08500), here in the judge's feature space instead of Inception's.
Precision and recall: Kynkäänniemi et al. 2019 (arXiv:1904.06991), k = 3. Classification accuracy score: Ravuri & Vinyals 2019
(arXiv:1905.10887); it is the accuracy of ``judge.train_judge`` on the digits and needs no function of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NEIGHBOURS = 3
CONFIDENT = 0.9
ROWS_AT_ONCE = 1000


def frechet_distance(some: Tensor, others: Tensor) -> float:
    """Between the normal distributions fitted to two sets of features (n, d) and (m, d); 0 for the same mean and covariance."""
    (mean, covariance), (other_mean, other_covariance) = _moments(some), _moments(others)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # The trace of the square root of a product, by the eigenvalues of a symmetric matrix similar to it.
    shared = np.sqrt(np.linalg.eigvalsh(root @ other_covariance @ root).clip(0)).sum()
    distance = np.square(mean - other_mean).sum() + covariance.trace() + other_covariance.trace() - 2 * shared
    return max(0.0, float(distance))


def precision_and_recall(fakes: Tensor, reals: Tensor, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of fakes among the reals, and of reals among the fakes; features (n, d) and (m, d).

    One set's region is a ball about each of its members, as wide as its ``neighbours``-th nearest other member is far.
    """
    return _share_within(fakes, reals, neighbours), _share_within(reals, fakes, neighbours)


def nearest(rows: Tensor, among: Tensor, count: int = 1) -> tuple[Tensor, Tensor]:
    """Euclidean distances (n, count) of each of ``rows`` (n, d) to the nearest of ``among`` (m, d), and their indices."""
    found = [part.topk(count, dim=1, largest=False) for part in _distances(rows, among)]
    return torch.cat([part.values for part in found]), torch.cat([part.indices for part in found])


def class_imbalance(probabilities: Tensor) -> float:
    """Kullback-Leibler divergence, in nats, of the classes that (n, classes) are judged to be from an even share of each."""
    classes = probabilities.shape[1]
    shares = torch.bincount(probabilities.argmax(1), minlength=classes).double() / len(probabilities)
    present = shares[shares > 0]
    return float((present * (present * classes).log()).sum())


def confident_share(probabilities: Tensor) -> float:
    """Share of rows of probabilities (n, classes) whose largest value exceeds 0.9."""
    return float((probabilities.max(dim=1).values > CONFIDENT).double().mean())


def _moments(features: Tensor) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    array = features.double().numpy()
    return array.mean(axis=0), np.atleast_2d(np.cov(array, rowvar=False))


def _share_within(rows: Tensor, members: Tensor, neighbours: int) -> float:
    # Each member is its own nearest: its distance to itself is the smallest, and the neighbours-th other comes after it.
    reach = torch.cat([part.kthvalue(neighbours + 1, dim=1).values for part in _distances(members, members)])
    within = [(part <= reach).any(dim=1) for part in _distances(rows, members)]
    return float(torch.cat(within).double().mean())


def _distances(rows: Tensor, among: Tensor) -> Iterator[Tensor]:
    for part in rows.split(ROWS_AT_ONCE):
        yield torch.cdist(part, among, compute_mode="use_mm_for_euclid_dist")
