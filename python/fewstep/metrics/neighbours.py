"""Metrics by nearest neighbours: precision, recall, coverage, agreement, memorisation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fewstep.metrics.samples import check_labels, flattened, pair

# Elements of one block of a distance matrix, 32 MiB in float64.
BLOCK = 2**22


@dataclass(frozen=True)
class PrecisionRecallCoverage:
    """What `precision_recall_coverage` returns.

    Attributes:
        precision: share of generated samples inside a k-NN ball of a real one.
        recall: share of real samples inside a k-NN ball of a generated one.
        coverage: share of real samples whose own k-NN ball holds a generated one.
    """

    precision: float
    recall: float
    coverage: float


@torch.no_grad()
def precision_recall_coverage(
    real: Tensor, generated: Tensor, *, k: int = 5
) -> PrecisionRecallCoverage:
    """Precision, recall and coverage of k-nearest-neighbour manifolds.

    The manifold of a set is the union of closed balls around its points. Each ball reaches to the
    k-th nearest other point of the same set.

    Source: Kynkaanniemi et al., Improved precision and recall metric (2019), equations 1 and 2;
    Naeem et al., Reliable fidelity and diversity metrics (2020), section 3 for coverage.

    Args:
        real (Tensor): samples `[n, ...]`, n above k.
        generated (Tensor): samples `[m, ...]`, m above k.
        k (int): number of the neighbour that sets the radius.

    Returns:
        PrecisionRecallCoverage: three shares. They depend on n, m and k, so compare equal sizes.

    Raises:
        ValueError: k below 1, k or fewer samples, not finite, unequal d or device.
        TypeError: not a floating tensor.

    >>> import torch
    >>> real = torch.tensor([[0.0], [1.0], [2.0], [10.0]])
    >>> generated = torch.tensor([[0.5], [1.5], [-5.0]])
    >>> precision_recall_coverage(real, generated, k=1)
    PrecisionRecallCoverage(precision=0.6666666666666666, recall=0.75, coverage=0.75)
    """
    _check_k("precision_recall_coverage", k)
    real, generated = pair("precision_recall_coverage", k + 1, real=real, generated=generated)

    def squared_radii(x: Tensor) -> Tensor:
        # A point at exactly the k-th distance counts as inside, in spite of rounding.
        return nearest(x, x, k, same=True)[0][:, -1].square() * (1 + 1e-9)

    real_radii, generated_radii = squared_radii(real), squared_radii(generated)
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    for rows, d2 in squared_distances(generated, real):
        inside = d2 <= real_radii  # [rows, n]
        precise += int(inside.any(1).sum())
        covered |= inside.any(0)
        recalled |= (d2 <= generated_radii[rows, None]).any(0)
    return PrecisionRecallCoverage(
        precision=precise / len(generated),
        recall=recalled.double().mean().item(),
        coverage=covered.double().mean().item(),
    )


@torch.no_grad()
def knn_agreement(
    real: Tensor,
    real_labels: Tensor,
    generated: Tensor | None = None,
    generated_labels: Tensor | None = None,
    *,
    k: int = 3,
) -> float:
    """Share of generated samples to which a k-NN classifier gives the class that was asked for.

    The majority of the k nearest real samples decides. On a tie it is the nearest of the classes.

    Args:
        real (Tensor): samples `[n, ...]`, n at least k.
        real_labels (Tensor): integers `[n]`.
        generated (Tensor | None): samples `[m, ...]`. Default: the real ones, which gives the
            floor. Each is then left out of its own vote, and n must be above k.
        generated_labels (Tensor | None): integers `[m]`, given with `generated`.
        k (int): number of neighbours that vote.

    Returns:
        float: a share in [0, 1].

    Raises:
        ValueError: k below 1, too few real samples, not finite, unequal d or device, labels of
            another length or missing.
        TypeError: not a floating tensor, labels that are not integers.

    >>> import torch
    >>> real, labels = torch.tensor([[0.0], [1.0], [8.0], [9.0]]), torch.tensor([0, 0, 1, 1])
    >>> knn_agreement(real, labels, torch.tensor([[0.4], [7.0]]), torch.tensor([0, 0]), k=1)
    0.5
    >>> knn_agreement(real, labels, k=1)
    1.0
    """
    _check_k("knn_agreement", k)
    x, query = _reference_and_query("knn_agreement", real, generated, k)
    check_labels("knn_agreement", "real_labels", real_labels, x)
    if generated is None:
        if generated_labels is not None:
            raise ValueError("knn_agreement: generated_labels must come with generated, got None")
        asked = real_labels
    elif generated_labels is None:
        raise ValueError("knn_agreement: generated_labels must come with generated, got None")
    else:
        asked = generated_labels
        check_labels("knn_agreement", "generated_labels", asked, query)
    neighbours = nearest(query, x, k, same=generated is None)[1]
    return vote(real_labels.to(x.device)[neighbours], asked.to(x.device))


@torch.no_grad()
def nearest_distance(real: Tensor, generated: Tensor | None = None) -> float:
    """Mean Euclidean distance from each generated sample to the nearest real one.

    Far above the floor the samples are off the data. Far below it they are copies or averages.

    Args:
        real (Tensor): samples `[n, ...]`.
        generated (Tensor | None): samples `[m, ...]`. Default: the real ones, which gives the
            floor. Each is then compared with the other real samples, and n must be at least 2.

    Returns:
        float: distance in units of real.

    Raises:
        ValueError: too few samples, not finite, unequal d or device.
        TypeError: not a floating tensor.

    >>> import torch
    >>> real = torch.tensor([[0.0], [1.0], [4.0]])
    >>> nearest_distance(real, torch.tensor([[0.25], [5.0]])), round(nearest_distance(real), 4)
    (0.625, 1.6667)
    """
    x, query = _reference_and_query("nearest_distance", real, generated, 1)
    return nearest(query, x, 1, same=generated is None)[0].mean().item()


def _reference_and_query(
    function: str, real: Tensor, generated: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    if generated is None:
        x = flattened(function, "real", real, k + 1)
        return x, x
    flattened(function, "real", real, k)
    return pair(function, real=real, generated=generated)


def _check_k(function: str, k: int) -> None:
    if k < 1:
        raise ValueError(f"{function}: k must be at least 1, got {k}")


def squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of `|x_i - y_j|^2`, `[rows, m]`."""
    # The expanded square cancels: centre first.
    shift = y.mean(0)
    x, y = x - shift, y - shift
    y_norms = y.square().sum(1)
    rows = max(1, BLOCK // len(y))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        block = torch.addmm(y_norms, part, y.T, alpha=-2)
        block += part.square().sum(1, keepdim=True)
        yield slice(start, start + len(part)), block.clamp_min_(0)


def nearest(x: Tensor, y: Tensor, k: int, *, same: bool) -> tuple[Tensor, Tensor]:
    """Distances and indices `[n, k]` of the k nearest y of each x, without itself if `same`."""
    distances, indices = [], []
    for rows, d2 in squared_distances(x, y):
        if same:
            d2.diagonal(rows.start).fill_(torch.inf)
        found = d2.topk(k, largest=False).indices
        # The expanded square loses the digits of a small distance: take the k anew.
        exact = [(x[rows] - y[column]).norm(dim=1) for column in found.T]
        distances.append(torch.stack(exact, dim=1))
        indices.append(found)
    return torch.cat(distances), torch.cat(indices)


def vote(neighbours: Tensor, asked: Tensor) -> float:
    """Share of rows of `neighbours [n, k]`, nearest first, whose majority is `asked [n]`."""
    classes, votes = torch.unique(neighbours, return_inverse=True)
    k = votes.shape[1]
    # Below one vote together, these weights decide ties for the nearest.
    weights = 1 + 0.5 ** torch.arange(1, k + 1, dtype=torch.float64, device=votes.device) / k
    # [n, classes]
    counts = torch.zeros(len(votes), len(classes), dtype=torch.float64, device=votes.device)
    counts.scatter_add_(1, votes, weights.expand_as(votes))
    return float((classes[counts.argmax(1)] == asked).double().mean())
