"""`report`: two-sample metrics that need no download, each beside its real-vs-real floor.

Samples are tensors `[n, ...]`. They are flattened to `[n, d]` and computed in float64 on their
device. The metrics return Python floats and are not differentiable.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor

from fewstep.metrics.classifier import classifier_features
from fewstep.metrics.distances import (
    exact_w2,
    frechet_distance,
    median_distance,
    mmd_rbf,
    sliced_w2,
)
from fewstep.metrics.neighbours import nearest, precision_recall_coverage, vote
from fewstep.metrics.samples import check_labels, draw, flattened, generator_of, pair, reduced
from fewstep.metrics.tables import aligned

_BETTER: dict[str, Literal["lower", "higher", "near floor"]] = {
    "sliced W2^2": "lower",
    "RBF-MMD^2": "lower",
    "FD-local": "lower",
    "precision": "higher",
    "recall": "higher",
    "coverage": "higher",
    "3-NN agreement": "higher",
}


@dataclass(frozen=True)
class MetricRow:
    """One line of a `report`.

    Attributes:
        name: name of the metric.
        value: metric of generated against real samples.
        floor: metric of real against as many other real samples.
        better: direction that is good. "near floor" if overshooting is a fault too.
    """

    name: str
    value: float
    floor: float
    better: Literal["lower", "higher", "near floor"]


@torch.no_grad()
def within_class_std(x: Tensor, labels: Tensor) -> float:
    """Root mean, over classes and coordinates, of the unbiased within-class variance.

    Every class of two or more samples has the same weight. Smaller ones are left out.

    Args:
        x (Tensor): samples `[n, ...]`.
        labels (Tensor): integers `[n]`.

    Returns:
        float: deviation in units of x.

    Raises:
        ValueError: no class of two samples, not finite, labels of another length.
        TypeError: not a floating tensor, labels that are not integers.

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    >>> round(within_class_std(x, torch.tensor([0, 0, 1, 1])) ** 2, 6)
    5.0
    """
    x = flattened("within_class_std", "x", x)
    check_labels("within_class_std", "labels", labels, x)
    labels = labels.to(x.device)
    classes, counts = torch.unique(labels, return_counts=True)
    variances = [x[labels == c].var(dim=0).mean() for c in classes[counts > 1]]
    if not variances:
        raise ValueError(
            f"within_class_std: labels must have a class of two samples, got {labels.tolist()[:9]}"
        )
    return torch.stack(variances).mean().sqrt().item()


@torch.no_grad()
def report(
    real: Tensor,
    generated: Tensor,
    *,
    real_labels: Tensor | None = None,
    generated_labels: Tensor | None = None,
    seed: int = 0,
    max_samples: int = 10_000,
) -> list[MetricRow]:
    """Compute every metric of this module, with its real-vs-real floor at the same sample sizes.

    The real samples give two disjoint draws R and D of `m = min(len(generated), len(real) // 2)`.
    The value compares R with m generated samples, and the floor compares R with D. The bandwidth is
    R's median distance, and the classifier of FD-local never sees D. For k-NN agreement and the
    nearest distance the value searches all real samples. The floor does the same with each real
    sample left out. The spread is a ratio to that of all real samples.

    With `generated_labels` R and D have the class shares of all real samples. Ask for samples in
    these shares, because other shares count as a difference between generated and real.

    Copies and averages of real samples bring the exact W2^2 and the nearest distance below their
    floors. For these two, below the floor is no better than above.

    Args:
        real (Tensor): samples `[n, ...]`, n at least 12.
        generated (Tensor): samples `[m, ...]`, m at least 6.
        real_labels (Tensor | None): integers `[n]`. Without them FD-local and the agreement are
            left out.
        generated_labels (Tensor | None): integers `[m]`, the classes that were asked for. Without
            them the agreement is left out and the spread is that of all samples.
        seed (int): seed of the draws, the projections and the classifier.
        max_samples (int): largest number of samples. Larger sets are reduced to a random subset.

    Returns:
        list[MetricRow]: rows with W2^2 in squared units of the samples and distances in their
        units.

    Raises:
        ValueError: too few samples, not finite, unequal d or device, labels of another length,
            generated_labels without real_labels, max_samples below 12.
        TypeError: not a floating tensor, labels that are not integers.
        ImportError: POT is missing.

    >>> import torch
    >>> x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    >>> [row.name for row in report(x[:40], x[40:])][:3]
    ['sliced W2^2', 'exact W2^2', 'RBF-MMD^2']
    """
    k = 5
    pair("report", k + 1, real=real, generated=generated)
    if len(real) < 2 * (k + 1):
        raise ValueError(f"report: real must have at least {2 * (k + 1)} samples, got {len(real)}")
    if max_samples < 2 * (k + 1):
        raise ValueError(f"report: max_samples must be at least {2 * (k + 1)}, got {max_samples}")
    if real_labels is None:
        if generated_labels is not None:
            raise ValueError("report: real_labels must be given with generated_labels, got None")
        real_labels = real.new_zeros(len(real), dtype=torch.int64)
    check_labels("report", "real_labels", real_labels, real)
    if generated_labels is not None:
        check_labels("report", "generated_labels", generated_labels, generated)

    generator = generator_of(seed)
    conditional = generated_labels is not None
    asked = generated_labels
    if asked is None:
        asked = torch.zeros(len(generated), dtype=torch.int64)
    real, real_labels = reduced(real, real_labels, max_samples, generator)
    generated, asked = reduced(generated, asked, max_samples, generator)
    generated = generated.reshape(-1, *real.shape[1:])
    groups = real_labels if conditional else torch.zeros_like(real_labels)

    m = min(len(generated), len(real) // 2)
    # D is `held`; R comes from the rest, which also trains the classifier.
    held = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    held[draw(groups, m, generator)] = True
    rest, rest_labels = real[~held], real_labels[~held]
    reference = rest[draw(groups[~held], m, generator)]
    features = None
    if len(torch.unique(rest_labels)) > 1:
        features = classifier_features(rest, rest_labels, seed=seed)
    bandwidth = median_distance(reference.double().flatten(1))
    if bandwidth == 0:
        raise ValueError("report: real must not repeat one sample, got a median distance of 0")

    def compare(other: Tensor) -> dict[str, float]:
        out = {
            "sliced W2^2": sliced_w2(reference, other, seed=seed),
            "exact W2^2": exact_w2(reference, other, seed=seed),
            "RBF-MMD^2": mmd_rbf(reference, other, bandwidth=bandwidth),
        }
        if features is not None:
            out["FD-local"] = frechet_distance(features(reference), features(other))
        return out | asdict(precision_recall_coverage(reference, other, k=k))

    values = compare(generated[draw(asked, m, generator)])
    floors = compare(real[held])
    pool = real.double().flatten(1)
    for out, query, labels in ((values, generated, asked), (floors, real, real_labels)):
        distances, indices = nearest(query.double().flatten(1), pool, 3, same=query is real)
        if conditional:
            out["3-NN agreement"] = vote(real_labels[indices], labels)
        out["nearest distance"] = distances[:, 0].mean().item()
    spread = "class std ratio" if conditional else "total std ratio"
    unit = within_class_std(real, groups)
    values[spread] = within_class_std(generated, asked) / unit
    floors[spread] = within_class_std(real[held], groups[held]) / unit
    return [
        MetricRow(name, value, floors[name], _BETTER.get(name, "near floor"))
        for name, value in values.items()
    ]


def format_report(rows: Sequence[MetricRow]) -> str:
    """Format a `report` as plain text, with metric, value, floor and the direction that is good.

    >>> print(format_report([MetricRow("recall", 0.75, 0.9, "higher")]))
    metric  generated  real vs real  better
    recall       0.75           0.9  higher
    """
    head = ("metric", "generated", "real vs real", "better")
    cells = [head, *((r.name, f"{r.value:.3g}", f"{r.floor:.3g}", r.better) for r in rows)]
    widest = max(len(row[3]) for row in cells)
    return aligned([(*row[:3], f"{row[3]:<{widest}}") for row in cells])
