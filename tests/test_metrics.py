from __future__ import annotations

import importlib
import itertools
import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from fewstep.metrics.classifier import classifier_features, frechet_local
from fewstep.metrics.distances import exact_w2, frechet_distance, mmd_rbf, sliced_w2
from fewstep.metrics.neighbours import (
    PrecisionRecallCoverage,
    knn_agreement,
    nearest_distance,
    precision_recall_coverage,
)
from fewstep.metrics.summary import MetricRow, format_report, report, within_class_std


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def digits() -> tuple[Tensor, Tensor]:
    """1797 images `[n, 1, 8, 8]` in [-1, 1] and their labels, shuffled."""
    data = load_digits()
    images = torch.from_numpy(data.images).float()[:, None] / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.from_numpy(data.target)[order]


@pytest.mark.parametrize(("n", "m"), [(1, 1), (7, 7), (6, 4), (5, 12), (1, 9)])
def test_sliced_is_exact_in_one_dimension(n: int, m: int) -> None:
    x, y = normal(n, 1), 2 * normal(m, 1, seed=1) + 3
    assert sliced_w2(x, y) == pytest.approx(exact_w2(x, y), rel=1e-10)


def test_sliced_of_a_shift_is_its_square_over_d() -> None:
    x = normal(30, 4)
    shift = torch.tensor([3.0, 0.0, -1.0, 2.0], dtype=torch.float64)
    value = sliced_w2(x, x + shift, projections=20_000)
    # One direction has the relative standard deviation sqrt(2 (d - 1) / (d + 2)) = 1 here.
    assert value == pytest.approx(14 / 4, rel=5 / math.sqrt(20_000))


def test_sliced_laws() -> None:
    x, y = normal(40, 3), normal(25, 3, seed=1) + 1
    value = sliced_w2(x, y)
    assert sliced_w2(y, x) == pytest.approx(value, rel=1e-12)
    assert sliced_w2(10 * x, 10 * y) == pytest.approx(100 * value, rel=1e-12)
    assert sliced_w2(x + 1e6, y + 1e6) == pytest.approx(value, rel=1e-8)
    assert sliced_w2(x.flip(0), y) == pytest.approx(value, rel=1e-12)
    # Repeating every sample leaves the law as it is.
    assert sliced_w2(x.repeat(3, 1), y) == pytest.approx(value, rel=1e-12)
    assert sliced_w2(x, x) == 0
    assert sliced_w2(x, y, seed=1) != value


def test_exact_w2_against_all_assignments() -> None:
    x, y = normal(6, 3), normal(6, 3, seed=1)
    cost = (x[:, None] - y).square().sum(-1)
    best = min(
        sum(cost[i, j].item() for i, j in enumerate(p)) for p in itertools.permutations(range(6))
    )
    assert exact_w2(x, y) == pytest.approx(best / 6, rel=1e-12)


def test_exact_w2_of_a_shift() -> None:
    x = normal(50, 2, 3)
    assert exact_w2(x, x.flip(0) + 0.5) == pytest.approx(6 * 0.25, rel=1e-12)


def test_exact_w2_draws_a_subset_by_seed() -> None:
    x, y = normal(60, 2), normal(80, 2, seed=1)
    values = [exact_w2(x, y, max_points=20, seed=seed) for seed in (0, 0, 1)]
    assert values[0] == values[1] != values[2]
    assert exact_w2(x, y) < values[0]


def test_exact_w2_without_pot(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"exact_w2: needs POT: pip install pot"):
        exact_w2(normal(3, 2), normal(3, 2))


def test_mmd_against_its_sums() -> None:
    x, y = normal(5, 2), normal(4, 2, seed=1)

    def mean_kernel(pairs: list[tuple[Tensor, Tensor]]) -> float:
        return sum(math.exp(-(p - q).square().sum().item() / 4.5) for p, q in pairs) / len(pairs)

    expected = (
        mean_kernel(list(itertools.permutations(x, 2)))
        + mean_kernel(list(itertools.permutations(y, 2)))
        - 2 * mean_kernel(list(itertools.product(x, y)))
    )
    assert mmd_rbf(x, y, bandwidth=1.5) == pytest.approx(expected, rel=1e-12)


def test_mmd_median_bandwidth() -> None:
    x, y = torch.tensor([[0.0], [1.0]]), torch.tensor([[10.0]] * 2)
    # Pairwise distances 0, 1, 9, 9, 10, 10: the lower median is 9.
    assert mmd_rbf(x, y) == mmd_rbf(x, y, bandwidth=9.0)


def test_mmd_is_unbiased_for_equal_laws() -> None:
    values = torch.tensor(
        [mmd_rbf(normal(30, 3, seed=2 * i), normal(20, 3, seed=2 * i + 1)) for i in range(60)]
    )
    assert values.min() < 0 < values.max()
    assert values.mean().abs() < 3 * values.std() / math.sqrt(60)


@pytest.mark.parametrize("metric", [exact_w2, mmd_rbf, frechet_distance])
def test_metrics_do_not_see_a_translation(metric: Callable[[Tensor, Tensor], float]) -> None:
    x, y = normal(30, 3), normal(40, 3, seed=1) + 0.5
    assert metric(x + 1e6, y + 1e6) == pytest.approx(metric(x, y), rel=1e-7)


@pytest.mark.parametrize("metric", [sliced_w2, exact_w2, mmd_rbf])
def test_metrics_grow_with_a_shift(metric: Callable[[Tensor, Tensor], float]) -> None:
    x, y = normal(80, 3), normal(80, 3, seed=1)
    values = [metric(x, y + shift) for shift in (0.0, 0.5, 1.0, 2.0)]
    assert values == sorted(values)
    assert values[3] > 3 * values[1]


def test_precision_recall_coverage_by_hand() -> None:
    real = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0], [9.0, 9.0]])
    # On the circle of the first ball, far off, and by the outlier, whose ball is 12 wide.
    generated = torch.tensor([[-1.0, 0.0], [-50.0, 0.0], [9.0, 8.0], [9.0, 8.25]])
    found = precision_recall_coverage(real, generated, k=1)
    assert found == PrecisionRecallCoverage(precision=0.75, recall=0.75, coverage=0.5)
    with pytest.raises(FrozenInstanceError):
        found.recall = 1.0  # type: ignore[misc]


def test_a_sample_on_the_sphere_is_inside_in_spite_of_rounding() -> None:
    for shift in (0.0, 0.7, 1.4, 2.1):
        line = (0.1 * torch.arange(40, dtype=torch.float64) + shift)[:, None] * torch.ones(3)
        # Both ends are on the sphere of their one neighbour.
        found = precision_recall_coverage(line[1:-1], line[[0, -1]], k=1)
        assert (found.precision, found.coverage) == (1, 2 / 38)


def test_precision_recall_coverage_against_dense_distances() -> None:
    real, generated = normal(60, 3), 1.3 * normal(50, 3, seed=1) + 0.4
    cross = torch.cdist(real, generated, compute_mode="donot_use_mm_for_euclid_dist")
    for k in (1, 4):
        # Column 0 of the sorted distances is the point itself.
        real_radii = torch.cdist(real, real).sort().values[:, k]
        generated_radii = torch.cdist(generated, generated).sort().values[:, k]
        in_real, in_generated = cross <= real_radii[:, None], cross <= generated_radii
        assert precision_recall_coverage(real, generated, k=k) == (
            PrecisionRecallCoverage(
                precision=in_real.any(0).double().mean().item(),
                recall=in_generated.any(1).double().mean().item(),
                coverage=in_real.any(1).double().mean().item(),
            )
        )


def test_precision_recall_coverage_of_a_collapsed_generator() -> None:
    real = normal(40, 3)
    found = precision_recall_coverage(real, real[:1].repeat(10, 1))
    assert found.precision == 1
    # Only the repeated sample itself is in balls of radius 0.
    assert found.recall == 1 / 40
    assert found.coverage < 0.5


def with_moments(n: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """Samples whose unbiased moments are exactly these."""
    z = normal(n, len(mean), seed=seed)
    z = z - z.mean(0)
    z = torch.linalg.solve_triangular(torch.linalg.cholesky(z.T.cov()), z.T, upper=False).T
    return z @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_of_gaussians() -> None:
    s = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
    t = torch.tensor([[0.5, -0.4], [-0.4, 3.0]], dtype=torch.float64)
    m = torch.tensor([1.0, -2.0], dtype=torch.float64)
    x, y = with_moments(40, m, s, seed=0), with_moments(30, 0 * m, t, seed=1)
    # For 2 x 2 matrices tr sqrt(A) = sqrt(tr A + 2 sqrt(det A)).
    product = s @ t
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = 5 + (s.trace() + t.trace() - 2 * root).item()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(y, x) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_with_fewer_samples_than_dimensions() -> None:
    x = normal(5, 20)
    assert frechet_distance(x, x + 2) == pytest.approx(80, rel=1e-8)
    assert frechet_distance(x, 3 * (x - x.mean(0)) + x.mean(0)) == pytest.approx(
        4 * x.var(0).sum().item(), rel=1e-8
    )


def test_frechet_local_grows_with_noise() -> None:
    images, labels = digits()
    real, other = images[:800], images[800:1600]
    features = classifier_features(real, labels[:800])
    noise = normal(*other.shape, seed=1).float()
    values = [
        frechet_distance(features(real), features(other + sigma * noise))
        for sigma in (0.0, 0.25, 0.5, 1.0)
    ]
    assert values == sorted(values)
    assert values[1] > 1.5 * values[0]
    assert frechet_local(real, other, labels[:800]) == values[0]


@pytest.mark.parametrize("flat", [False, True], ids=["conv", "mlp"])
def test_classifier_features_separate_classes(flat: bool) -> None:
    images, labels = digits()
    images = images.flatten(1) if flat else images
    features = classifier_features(images[:1000], labels[:1000])
    real, other = features(images[:1000]), features(images[1000:])
    assert real.shape == (1000, 64)
    assert knn_agreement(real, labels[:1000], other, labels[1000:], k=5) > 0.95


def test_classifier_features_depend_on_the_seed_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.metrics.classifier._CLASSIFIER_STEPS", 20)
    images, labels = digits()
    images, labels = images[:200], labels[:200]
    state = torch.get_rng_state()
    first = classifier_features(images, labels)(images)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        again = classifier_features(1 * images, 1 * labels)(images)
    assert torch.equal(first, again)
    assert not torch.equal(first, classifier_features(images, labels, seed=1)(images))


def test_knn_agreement_votes() -> None:
    real = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    labels = torch.tensor([7, -2, -2, 7, 5])
    query, asked = torch.tensor([[0.1], [-1.0], [3.9]]), torch.tensor([7, -2, 5])
    # Majority -2 twice; three different classes around 3.9, of which 5 is nearest.
    assert knn_agreement(real, labels, query, asked, k=3) == pytest.approx(2 / 3)
    assert knn_agreement(real, labels, query, asked, k=1) == pytest.approx(2 / 3)
    assert knn_agreement(real, labels, query[:1], torch.tensor([3]), k=3) == 0


def test_leave_one_out_against_all_distances() -> None:
    images, labels = digits()
    images, labels = images[:300], labels[:300]
    flat = images.double().flatten(1)
    distances = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    distances.fill_diagonal_(math.inf)
    nearest, index = distances.min(1)
    assert nearest_distance(images) == pytest.approx(nearest.mean().item(), rel=1e-12)
    expected = (labels[index] == labels).double().mean().item()
    assert knn_agreement(images, labels, k=1) == expected


def test_nearest_distance_of_copies_is_exactly_zero() -> None:
    real = normal(50, 7) + 1e5
    assert nearest_distance(real, real[10:20]) == 0
    assert nearest_distance(real, real[:5] + 1e-3) == pytest.approx(1e-3 * math.sqrt(7), rel=1e-6)


def test_within_class_std() -> None:
    x = normal(90, 2, 3)
    labels = torch.arange(90) % 3
    parts = [x[labels == c].flatten(1).var(0) for c in range(3)]
    expected = torch.stack(parts).mean().sqrt().item()
    assert within_class_std(x, labels) == pytest.approx(expected, rel=1e-12)
    moved = 2 * x + 100.0 * labels[:, None, None]
    assert within_class_std(moved, labels) == pytest.approx(2 * expected, rel=1e-10)
    alone = torch.cat([x, x[:1] + 50]), torch.cat([labels, torch.tensor([3])])
    assert within_class_std(*alone) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("block", [1, 100, 1000])
def test_blocks_do_not_change_results(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    x, y = normal(45, 4), normal(37, 4, seed=1) + 0.3

    def everything() -> list[float]:
        prc = precision_recall_coverage(x, y, k=2)
        return [
            prc.precision,
            prc.recall,
            prc.coverage,
            sliced_w2(x, y, projections=16),
            exact_w2(x, y),
            mmd_rbf(x, y),
            nearest_distance(x),
            nearest_distance(x, y),
        ]

    whole = everything()
    for module in ("distances", "neighbours"):
        monkeypatch.setattr(f"fewstep.metrics.{module}.BLOCK", block)
    assert everything() == pytest.approx(whole, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_dtype_is_computed_in_float64(dtype: torch.dtype) -> None:
    x, y = normal(30, 4).to(dtype), normal(30, 4, seed=1).to(dtype).requires_grad_()
    for metric in (
        sliced_w2,
        exact_w2,
        mmd_rbf,
        precision_recall_coverage,
        frechet_distance,
        nearest_distance,
    ):
        assert metric(x, y) == metric(x.double(), y.double())


def test_report_of_real_samples_is_at_its_floor() -> None:
    images, labels = digits()
    # Every third of each class.
    fresh = torch.zeros(len(labels), dtype=torch.bool)
    fresh[labels.argsort(stable=True)[::3]] = True
    rows = report(
        images[~fresh],
        images[fresh],
        real_labels=labels[~fresh],
        generated_labels=labels[fresh],
    )
    found = {row.name: row for row in rows}
    assert [(row.name, row.better) for row in rows] == [
        ("sliced W2^2", "lower"),
        ("exact W2^2", "near floor"),
        ("RBF-MMD^2", "lower"),
        ("FD-local", "lower"),
        ("precision", "higher"),
        ("recall", "higher"),
        ("coverage", "higher"),
        ("3-NN agreement", "higher"),
        ("nearest distance", "near floor"),
        ("class std ratio", "near floor"),
    ]
    for name in ("precision", "recall", "coverage", "3-NN agreement", "class std ratio"):
        assert found[name].value == pytest.approx(found[name].floor, abs=0.03)
    for name in ("exact W2^2", "nearest distance"):
        assert found[name].value == pytest.approx(found[name].floor, rel=0.04)
    for name in ("sliced W2^2", "FD-local"):
        assert found[name].value == pytest.approx(found[name].floor, rel=0.4)
    assert abs(found["RBF-MMD^2"].value) < 1e-3


def test_report_tells_faults_apart() -> None:
    images, labels = digits()
    real, real_labels = images[:800], labels[:800]

    def rows(generated: Tensor, asked: Tensor) -> dict[str, MetricRow]:
        found = report(real, generated, real_labels=real_labels, generated_labels=asked)
        return {row.name: row for row in found}

    fresh, asked = images[1400:], labels[1400:]
    noisy = rows(fresh + 0.5 * normal(*fresh.shape).float(), asked)
    for name in ("sliced W2^2", "exact W2^2", "RBF-MMD^2", "FD-local", "nearest distance"):
        assert noisy[name].value > 1.2 * noisy[name].floor
    assert noisy["precision"].value < noisy["precision"].floor - 0.2

    copies = rows(real[: len(fresh)], real_labels[: len(fresh)])
    assert copies["nearest distance"].value == 0
    assert copies["exact W2^2"].value < 0.8 * copies["exact W2^2"].floor

    means = torch.stack([real[real_labels == c].mean(0) for c in asked])
    collapsed = rows(means + 0.01 * normal(*means.shape, seed=1).float(), asked)
    assert collapsed["class std ratio"].value < 0.05
    assert collapsed["recall"].value < 0.05
    assert collapsed["coverage"].value < collapsed["coverage"].floor - 0.2

    swapped = rows(fresh, (asked + 1) % 10)
    assert swapped["3-NN agreement"].value < 0.05
    # The floor is that of the real samples, whatever was generated.
    for name in ("3-NN agreement", "nearest distance", "precision"):
        assert swapped[name].floor == noisy[name].floor == copies[name].floor


def test_the_classifier_never_sees_the_samples_of_the_floor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trained: list[Tensor] = []
    asked: list[Tensor] = []

    def spy(images: Tensor, labels: Tensor, *, seed: int) -> Callable[[Tensor], Tensor]:
        trained.append(images)

        def features(x: Tensor) -> Tensor:
            asked.append(x)
            return x

        return features

    monkeypatch.setattr("fewstep.metrics.summary.classifier_features", spy)
    real, labels = normal(50, 3), torch.arange(50) % 4
    report(real, normal(20, 3, seed=1), real_labels=labels)
    reference, generated, again, held = asked
    assert torch.equal(reference, again)
    assert len(reference) == len(generated) == len(held) == 20
    distances = torch.cdist(held, trained[0], compute_mode="donot_use_mm_for_euclid_dist")
    assert distances.min() > 0
    assert nearest_distance(trained[0], reference) == 0
    assert len(trained[0]) == 30


def test_report_is_deterministic_and_takes_flat_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fewstep.metrics.classifier._CLASSIFIER_STEPS", 20)
    images, labels = digits()
    arguments = images[:300], images[300:500].flatten(1)
    rows = report(*arguments, real_labels=labels[:300])
    assert rows == report(*arguments, real_labels=labels[:300])
    assert rows != report(*arguments, real_labels=labels[:300], seed=1)
    assert [row.name for row in rows][-2:] == ["nearest distance", "total std ratio"]
    assert "FD-local" in [row.name for row in rows]


def test_report_without_labels() -> None:
    rows = report(normal(40, 2), normal(90, 2, seed=1), max_samples=30)
    names = [row.name for row in rows]
    assert "FD-local" not in names
    assert "3-NN agreement" not in names
    assert all(math.isfinite(row.value) and math.isfinite(row.floor) for row in rows)


def test_format_report_is_aligned() -> None:
    table = format_report(
        [
            MetricRow("sliced W2^2", 123.456, 0.00012345, "lower"),
            MetricRow("recall", 0.5, 1.0, "higher"),
        ]
    )
    assert table.splitlines() == [
        "metric       generated  real vs real  better",
        "sliced W2^2        123      0.000123  lower",
        "recall             0.5             1  higher",
    ]


X, L = normal(6, 2), torch.tensor([0, 1, 0, 1, 0, 1])
BAD_VALUES: list[tuple[Callable[[], object], str]] = [
    (lambda: sliced_w2(X, normal(6, 3)), r"sliced_w2: y must have 2 .* got 3"),
    (lambda: sliced_w2(X, X[:0]), r"sliced_w2: y .* at least 1 samples, got 0"),
    (lambda: sliced_w2(X[:, 0], X), r"sliced_w2: x must be \[n, \.\.\.\], got \(6,\)"),
    (lambda: sliced_w2(X[:, :0], X), r"sliced_w2: x must be .* got \(6, 0\)"),
    (lambda: sliced_w2(X, X, projections=0), r"projections must be .* got 0"),
    (lambda: exact_w2(X, X, max_points=0), r"max_points must be .* got 0"),
    (lambda: exact_w2(X, X.to("meta")), r"exact_w2: y must be on cpu, got meta"),
    (lambda: mmd_rbf(X[:1], X), r"mmd_rbf: x .* at least 2 samples, got 1"),
    (lambda: mmd_rbf(X, X, bandwidth=-1.0), r"bandwidth must be positive .* got -1.0"),
    (lambda: mmd_rbf(0 * X, 0 * X), r"the median distance must be positive .* got 0"),
    (lambda: precision_recall_coverage(X, X, k=0), r"k must be at least 1, got 0"),
    (lambda: precision_recall_coverage(X, X[:5]), r"generated .* at least 6 .* got 5"),
    (lambda: frechet_distance(X, X / 0), r"y must be finite, got 12 NaN or inf values"),
    (lambda: frechet_local(X, X, L[:5]), r"real_labels must have shape \(6,\), got \(5,\)"),
    (lambda: classifier_features(X, 0 * L), r"labels must name two classes, got \[0\]"),
    (lambda: knn_agreement(X, L, X), r"generated_labels must come with generated"),
    (lambda: knn_agreement(X, L, None, L), r"generated_labels must come with generated"),
    (lambda: knn_agreement(X, L, X, L[:2]), r"generated_labels must have .* got \(2,\)"),
    (lambda: knn_agreement(X[:3], L[:3]), r"real .* at least 4 samples, got 3"),
    (lambda: nearest_distance(X[:1]), r"real .* at least 2 samples, got 1"),
    (lambda: within_class_std(X, torch.arange(6)), r"a class of two samples, got \[0, 1"),
    (lambda: report(X, X), r"report: real must have at least 12 samples, got 6"),
    (lambda: report(normal(20, 2), X[:5]), r"report: generated .* at least 6 .* got 5"),
    (lambda: report(normal(20, 2), X, generated_labels=L), r"real_labels must be given"),
    (lambda: report(normal(20, 2), X, max_samples=11), r"max_samples .* got 11"),
    (lambda: report(torch.ones(20, 2), X), r"real must not repeat one sample"),
]


@pytest.mark.parametrize(("call", "message"), BAD_VALUES, ids=range(len(BAD_VALUES)))
def test_bad_values(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sliced_w2(X.long(), X), r"x must be a floating Tensor, got torch.int64"),
        (lambda: sliced_w2(X, [1.0]), r"y must be a floating Tensor, got list"),
        (lambda: within_class_std(X, X[:, 0]), r"labels must be an integer .*float64"),
        (lambda: report(normal(20, 2), X, real_labels=[1]), r"real_labels .* got list"),
    ],
    ids=["integers", "list", "floating labels", "list of labels"],
)
def test_bad_types(call: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        call()
