"""Two-sample metrics that need no download, each beside its real-vs-real floor in `report`.

Samples are tensors `[n, ...]`, flattened to `[n, d]` and computed in float64 on their device.
No metric is differentiable and every one returns Python floats.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from fewstep._torch import one_thread

# Elements of one block of a distance matrix, 32 MiB in float64.
_BLOCK = 2**22
_BETTER: dict[str, Literal["lower", "higher", "near floor"]] = {
    "sliced W2^2": "lower",
    "RBF-MMD^2": "lower",
    "FD-local": "lower",
    "precision": "higher",
    "recall": "higher",
    "coverage": "higher",
    "3-NN agreement": "higher",
}
_CLASSIFIER_STEPS, _CLASSIFIER_BATCH, _CLASSIFIER_WIDTH = 200, 128, 64


@dataclass(frozen=True)
class PrecisionRecallCoverage:
    """What `precision_recall_coverage` returns, each a share in [0, 1].

    Attributes:
        precision: generated samples inside a k-NN ball of a real one.
        recall: real samples inside a k-NN ball of a generated one.
        coverage: real samples whose own k-NN ball holds a generated one.
    """

    precision: float
    recall: float
    coverage: float


@dataclass(frozen=True)
class MetricRow:
    """One line of a `report`.

    Attributes:
        name: the metric.
        value: generated against real.
        floor: real against other real samples of the same number.
        better: which way is good; "near floor" where overshooting is a fault too.
    """

    name: str
    value: float
    floor: float
    better: Literal["lower", "higher", "near floor"]


@torch.no_grad()
def sliced_w2(x: Tensor, y: Tensor, *, projections: int = 512, seed: int = 0) -> float:
    """Sliced squared 2-Wasserstein distance.

    `SW2^2 = E_u int_0^1 (Q_<u,x>(t) - Q_<u,y>(t))^2 dt` with u uniform on the unit sphere and Q the
    quantile functions, which are integrated exactly for n and m that differ too.

    Source: Bonneel, Rabin, Peyre and Pfister, Sliced and Radon Wasserstein barycenters (2015).

    Args:
        x (Tensor): samples `[n, ...]`.
        y (Tensor): samples `[m, ...]`.
        projections (int): directions drawn.
        seed (int): of the directions.

    Returns:
        float: in squared units of x. A shift by s adds `|s|^2 / d` on average.

    Raises:
        ValueError: empty, not finite, unequal d or device, projections below 1.
        TypeError: not a floating tensor.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0], [5.0]])
    >>> round(sliced_w2(x, x + 2), 6)
    4.0
    """
    x, y = _pair("sliced_w2", x=x, y=y)
    if projections < 1:
        raise ValueError(f"sliced_w2: projections must be at least 1, got {projections}")
    (n, d), m = x.shape, len(y)
    directions = torch.randn(d, projections, generator=_generator(seed), dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(x.device)  # [d, projections]
    # Both quantile functions are constant between these levels, in units of 1 / (n m).
    steps_x = torch.arange(1, n + 1, device=x.device) * m
    steps_y = torch.arange(1, m + 1, device=x.device) * n
    levels = torch.unique(torch.cat([steps_x, steps_y]))
    weights = levels.diff(prepend=levels.new_zeros(1)).double() / (n * m)  # sums to 1
    shift = y.mean(0)
    total = 0.0
    for u in torch.split(directions, max(1, _BLOCK // (n + m)), dim=1):
        quantiles_x = (u.T @ (x - shift).T).sort(dim=1).values[:, (levels - 1) // m]
        quantiles_y = (u.T @ (y - shift).T).sort(dim=1).values[:, (levels - 1) // n]
        total += ((quantiles_x - quantiles_y).square_() @ weights).sum().item()
    return total / projections


@torch.no_grad()
def exact_w2(x: Tensor, y: Tensor, *, max_points: int = 2000, seed: int = 0) -> float:
    """Squared 2-Wasserstein distance `min_P sum_ij P_ij |x_i - y_j|^2` between the samples, exact.

    Solved by the network simplex of POT (`ot.emd2`), about 1 s at 2000 points.

    Source: Peyre and Cuturi, Computational Optimal Transport (2019), equation 2.11 and section 3.5.

    Args:
        x (Tensor): samples `[n, ...]`.
        y (Tensor): samples `[m, ...]`.
        max_points (int): larger samples are reduced to a random subset of this size.
        seed (int): of the subsets.

    Returns:
        float: in squared units of x. Biased upwards by the finite sample: compare equal sizes.

    Raises:
        ValueError: empty, not finite, unequal d or device, max_points below 1.
        TypeError: not a floating tensor.
        ImportError: POT is missing.
        RuntimeError: the network simplex did not finish.

    >>> import torch
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    >>> round(exact_w2(x, x.flip(0) + torch.tensor([0.0, 3.0])), 6)
    9.0
    """
    x, y = _pair("exact_w2", x=x, y=y)
    if max_points < 1:
        raise ValueError(f"exact_w2: max_points must be at least 1, got {max_points}")
    try:
        ot = importlib.import_module("ot")
    except ImportError:
        raise ImportError("exact_w2: needs POT: pip install 'fewstep[train]'") from None
    generator = _generator(seed)
    x, y = (_reduced(t, torch.zeros(len(t)), max_points, generator)[0] for t in (x, y))
    cost = torch.cat([block for _, block in _squared_distances(x, y)]).cpu().numpy()
    value, log = ot.emd2([], [], cost, numItermax=10_000_000, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"exact_w2: POT stopped early: {log['warning']}")
    return float(value)


@torch.no_grad()
def mmd_rbf(x: Tensor, y: Tensor, *, bandwidth: float | None = None) -> float:
    """Unbiased squared maximum mean discrepancy with a Gaussian kernel.

    `MMD^2 = mean_{i!=j} k(x_i, x_j) + mean_{i!=j} k(y_i, y_j) - 2 mean_ij k(x_i, y_j)` with
    `k(x, y) = exp(-|x - y|^2 / (2 h^2))`. It is 0 on average for equal laws, hence often negative.

    Source: Gretton et al., A kernel two-sample test (2012), equation 3; the median heuristic as in
    Garreau, Jitkrittum and Kanagawa (2018).

    Args:
        x (Tensor): samples `[n, ...]`, n at least 2.
        y (Tensor): samples `[m, ...]`, m at least 2.
        bandwidth (float | None): h, in units of x. Default: the median distance between two points
            of x and y together (of 2000 of them where there are more).

    Returns:
        float: at most 2.

    Raises:
        ValueError: fewer than 2 samples, not finite, unequal d or device, a bandwidth that is not
            positive, or none given where the median distance is 0.
        TypeError: not a floating tensor.

    >>> import torch
    >>> x = torch.tensor([[0.0], [1.0]])
    >>> round(mmd_rbf(x, x + 100, bandwidth=1.0), 4)
    1.2131
    """
    x, y = _pair("mmd_rbf", least=2, x=x, y=y)
    h = _median_distance(torch.cat([x, y])) if bandwidth is None else bandwidth
    if not 0 < h < float("inf"):
        source = "the median distance" if bandwidth is None else "bandwidth"
        raise ValueError(f"mmd_rbf: {source} must be positive and finite, got {h}")

    def kernel_sum(p: Tensor, q: Tensor) -> float:
        blocks = _squared_distances(p, q)
        return sum((d2 / (-2 * h * h)).exp_().sum().item() for _, d2 in blocks)

    n, m = len(x), len(y)
    # k(x, x) = 1 on the diagonal, n times.
    within_x = (kernel_sum(x, x) - n) / (n * (n - 1))
    within_y = (kernel_sum(y, y) - m) / (m * (m - 1))
    return within_x + within_y - 2 * kernel_sum(x, y) / (n * m)


@torch.no_grad()
def precision_recall_coverage(
    real: Tensor, generated: Tensor, *, k: int = 5
) -> PrecisionRecallCoverage:
    """Precision, recall and coverage of k-nearest-neighbour manifolds.

    The manifold of a set is the union of closed balls around its points, each up to the k-th
    nearest other point of the same set.

    Source: Kynkaanniemi et al., Improved precision and recall metric (2019), equations 1 and 2;
    Naeem et al., Reliable fidelity and diversity metrics (2020), section 3 for coverage.

    Args:
        real (Tensor): samples `[n, ...]`, n above k.
        generated (Tensor): samples `[m, ...]`, m above k.
        k (int): neighbours that set a radius.

    Returns:
        PrecisionRecallCoverage: all three depend on n, m and k: compare equal sizes.

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
    real, generated = _pair("precision_recall_coverage", k + 1, real=real, generated=generated)

    def squared_radii(x: Tensor) -> Tensor:
        # A point at exactly the k-th distance counts as inside, in spite of rounding.
        return _nearest(x, x, k, same=True)[0][:, -1].square() * (1 + 1e-9)

    real_radii, generated_radii = squared_radii(real), squared_radii(generated)
    precise = 0
    recalled = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    covered = recalled.clone()
    for rows, d2 in _squared_distances(generated, real):
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
def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Frechet distance (squared 2-Wasserstein) between Gaussians fitted to two samples.

    `|m_x - m_y|^2 + tr(S_x + S_y - 2 (S_x^1/2 S_y S_x^1/2)^1/2)` with means m and unbiased
    covariances S; the last trace is the nuclear norm of `S_x^1/2 S_y^1/2`.

    Source: Dowson and Landau, The Frechet distance between multivariate normal distributions
    (1982), equation 4.

    Args:
        x (Tensor): samples `[n, ...]`, n at least 2.
        y (Tensor): samples `[m, ...]`, m at least 2.

    Returns:
        float: in squared units of x. Biased upwards by the finite sample: compare equal sizes.

    Raises:
        ValueError: fewer than 2 samples, not finite, unequal d or device.
        TypeError: not a floating tensor.

    >>> import torch
    >>> x = torch.tensor([[-1.0], [1.0]])
    >>> round(frechet_distance(x, 3 * x + 5), 6)
    33.0
    """
    x, y = _pair("frechet_distance", least=2, x=x, y=y)
    x_root, y_root = _covariance_root(x), _covariance_root(y)
    # Singular values keep the digits that the root of an eigenvalue near 0 would lose.
    cross = torch.linalg.svdvals(x_root @ y_root).sum()
    spread = x_root.square().sum() + y_root.square().sum() - 2 * cross
    return float((x.mean(0) - y.mean(0)).square().sum() + spread.clamp_min(0))


@one_thread()
@torch.inference_mode(mode=False)
def classifier_features(
    images: Tensor, labels: Tensor, *, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """Train a small classifier and return the map to its penultimate features.

    Two strided convolutions and a layer of 64 ReLU features for images `[n, C, H, W]` of 8 x 8
    pixels and more, else two layers of 64; 200 steps of Adam, about 2 s for 28 x 28 on one thread.
    The same bits for the same seed and machine.

    Args:
        images (Tensor): `[n, ...]`, any scale.
        labels (Tensor): integers `[n]` of at least two classes.
        seed (int): of the initial weights and the batches.

    Returns:
        Callable: `[m, ...]` to features float32 `[m, 64]`.

    Raises:
        ValueError: empty, not finite, labels of another length or of one class.
        TypeError: not a floating tensor, labels that are not integers.

    >>> import torch
    >>> images = torch.eye(4).repeat(8, 1)
    >>> classifier_features(images, torch.arange(32) % 4)(images).shape
    torch.Size([32, 64])
    """
    flat = _flat("classifier_features", "images", images)
    _check_labels("classifier_features", "labels", labels, flat)
    classes, targets = torch.unique(labels.to(images.device), return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"classifier_features: labels must name two classes, got {classes.tolist()}"
        )
    shape, device = images.shape[1:], images.device
    offset, scale = flat.mean(), flat.std().clamp_min(torch.finfo(torch.float64).tiny)

    def prepare(x: Tensor) -> Tensor:
        return ((x.detach().double() - offset) / scale).float().reshape(len(x), *shape)

    body, head = _networks(shape, len(classes), seed, device)
    parameters = [*body.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=2e-3)
    generator = _generator(seed)
    # Callers may be inside no_grad or autocast.
    with (
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False),
    ):
        for _ in range(_CLASSIFIER_STEPS):
            batch = torch.randint(len(images), (_CLASSIFIER_BATCH,), generator=generator).to(device)
            loss = nn.functional.cross_entropy(head(body(prepare(images[batch]))), targets[batch])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()

    @one_thread()
    def features(x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            return torch.cat([body(prepare(part)) for part in torch.split(x, 1024)])

    return features


def frechet_local(real: Tensor, generated: Tensor, real_labels: Tensor, *, seed: int = 0) -> float:
    """FD-local: `frechet_distance` in the features of a classifier trained here on `real`.

    The features, so the unit, depend on the real samples and the seed: compare figures of one
    classifier only, at equal sizes. `report` puts the floor of the same classifier beside it.

    Source: Heusel et al., GANs trained by a two time-scale update rule (2017), equation 6, with the
    features of `classifier_features` in place of Inception's.

    Args:
        real (Tensor): samples `[n, ...]`, the classifier's training set.
        generated (Tensor): samples `[m, ...]`.
        real_labels (Tensor): integers `[n]`.
        seed (int): of the classifier.

    Returns:
        float: in squared units of the features.

    Raises:
        ValueError: fewer than 2 samples, not finite, unequal d or device, labels of another length
            or of one class.
        TypeError: not a floating tensor, labels that are not integers.

    >>> import torch
    >>> real = torch.eye(4).repeat(8, 1)
    >>> round(frechet_local(real, real, torch.arange(32) % 4), 6)
    0.0
    """
    _pair("frechet_local", least=2, real=real, generated=generated)
    _check_labels("frechet_local", "real_labels", real_labels, real)
    features = classifier_features(real, real_labels, seed=seed)
    return frechet_distance(features(real), features(generated))


@torch.no_grad()
def knn_agreement(
    real: Tensor,
    real_labels: Tensor,
    generated: Tensor | None = None,
    generated_labels: Tensor | None = None,
    *,
    k: int = 3,
) -> float:
    """Share of generated samples that a k-NN classifier on the real ones labels as asked.

    A majority of the k nearest real samples decides, the nearest of the tied classes on a tie.

    Args:
        real (Tensor): samples `[n, ...]`, n at least k.
        real_labels (Tensor): integers `[n]`.
        generated (Tensor | None): samples `[m, ...]`. Default: the real ones, each left out of its
            own vote (n above k), which is the floor.
        generated_labels (Tensor | None): integers `[m]`, given with `generated`.
        k (int): neighbours that vote.

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
    _check_labels("knn_agreement", "real_labels", real_labels, x)
    if generated is None:
        if generated_labels is not None:
            raise ValueError("knn_agreement: generated_labels must come with generated, got None")
        asked = real_labels
    elif generated_labels is None:
        raise ValueError("knn_agreement: generated_labels must come with generated, got None")
    else:
        asked = generated_labels
        _check_labels("knn_agreement", "generated_labels", asked, query)
    neighbours = _nearest(query, x, k, same=generated is None)[1]
    return _vote(real_labels.to(x.device)[neighbours], asked.to(x.device))


@torch.no_grad()
def nearest_distance(real: Tensor, generated: Tensor | None = None) -> float:
    """Mean Euclidean distance from each generated sample to the nearest real one.

    Far above the floor the samples are off the data, far below it they are copies or averages.

    Args:
        real (Tensor): samples `[n, ...]`.
        generated (Tensor | None): samples `[m, ...]`. Default: the real ones, each to the nearest
            other real sample (n at least 2), which is the floor.

    Returns:
        float: in units of real.

    Raises:
        ValueError: too few samples, not finite, unequal d or device.
        TypeError: not a floating tensor.

    >>> import torch
    >>> real = torch.tensor([[0.0], [1.0], [4.0]])
    >>> nearest_distance(real, torch.tensor([[0.25], [5.0]])), round(nearest_distance(real), 4)
    (0.625, 1.6667)
    """
    x, query = _reference_and_query("nearest_distance", real, generated, 1)
    return _nearest(query, x, 1, same=generated is None)[0].mean().item()


@torch.no_grad()
def within_class_std(x: Tensor, labels: Tensor) -> float:
    """Root mean, over classes and coordinates, of the unbiased within-class variance.

    Every class of two or more samples has the same weight; smaller ones are left out.

    Args:
        x (Tensor): samples `[n, ...]`.
        labels (Tensor): integers `[n]`.

    Returns:
        float: in units of x.

    Raises:
        ValueError: no class of two samples, not finite, labels of another length.
        TypeError: not a floating tensor, labels that are not integers.

    >>> import torch
    >>> x = torch.tensor([[0.0], [2.0], [10.0], [14.0]])
    >>> round(within_class_std(x, torch.tensor([0, 0, 1, 1])) ** 2, 6)
    5.0
    """
    x = _flat("within_class_std", "x", x)
    _check_labels("within_class_std", "labels", labels, x)
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
    """Every metric of this module, each beside its real-vs-real floor at the same sample sizes.

    The real samples give two disjoint draws R and D of `m = min(len(generated), len(real) // 2)`.
    The value compares R with m generated samples, the floor R with D; the bandwidth is R's median
    distance and the classifier of FD-local never sees D. For k-NN agreement and the nearest
    distance the value searches all real samples, and the floor the same with each sample left
    out. The spread is a ratio to that of all real samples.

    With `generated_labels` R and D have the class shares of all real samples, so ask for samples in
    these shares: other ones count as a difference between generated and real.

    Copies and averages of real samples bring the exact W2^2 and the nearest distance below their
    floors: there below is no better than above.

    Args:
        real (Tensor): samples `[n, ...]`, n at least 12.
        generated (Tensor): samples `[m, ...]`, m at least 6.
        real_labels (Tensor | None): integers `[n]`. Without them FD-local and the agreement are
            left out.
        generated_labels (Tensor | None): integers `[m]`, the classes asked for. Without them the
            agreement is left out and the spread is that of all samples.
        seed (int): of the draws, the projections and the classifier.
        max_samples (int): larger sets are reduced to a random subset of this size.

    Returns:
        list[MetricRow]: W2^2 in squared units of the samples, distances in their units.

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
    _pair("report", k + 1, real=real, generated=generated)
    if len(real) < 2 * (k + 1):
        raise ValueError(f"report: real must have at least {2 * (k + 1)} samples, got {len(real)}")
    if max_samples < 2 * (k + 1):
        raise ValueError(f"report: max_samples must be at least {2 * (k + 1)}, got {max_samples}")
    if real_labels is None:
        if generated_labels is not None:
            raise ValueError("report: real_labels must be given with generated_labels, got None")
        real_labels = real.new_zeros(len(real), dtype=torch.int64)
    _check_labels("report", "real_labels", real_labels, real)
    if generated_labels is not None:
        _check_labels("report", "generated_labels", generated_labels, generated)

    generator = _generator(seed)
    conditional = generated_labels is not None
    asked = generated_labels
    if asked is None:
        asked = torch.zeros(len(generated), dtype=torch.int64)
    real, real_labels = _reduced(real, real_labels, max_samples, generator)
    generated, asked = _reduced(generated, asked, max_samples, generator)
    generated = generated.reshape(-1, *real.shape[1:])
    groups = real_labels if conditional else torch.zeros_like(real_labels)

    m = min(len(generated), len(real) // 2)
    # D is `held`; R comes from the rest, which also trains the classifier.
    held = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    held[_draw(groups, m, generator)] = True
    rest, rest_labels = real[~held], real_labels[~held]
    reference = rest[_draw(groups[~held], m, generator)]
    features = None
    if len(torch.unique(rest_labels)) > 1:
        features = classifier_features(rest, rest_labels, seed=seed)
    bandwidth = _median_distance(reference.double().flatten(1))
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

    values = compare(generated[_draw(asked, m, generator)])
    floors = compare(real[held])
    pool = real.double().flatten(1)
    for out, query, labels in ((values, generated, asked), (floors, real, real_labels)):
        distances, indices = _nearest(query.double().flatten(1), pool, 3, same=query is real)
        if conditional:
            out["3-NN agreement"] = _vote(real_labels[indices], labels)
        out["nearest distance"] = distances[:, 0].mean().item()
    spread = "class std ratio" if conditional else "total std ratio"
    unit = within_class_std(real, groups)
    values[spread] = within_class_std(generated, asked) / unit
    floors[spread] = within_class_std(real[held], groups[held]) / unit
    return [
        MetricRow(name, value, floors[name], _BETTER.get(name, "near floor"))
        for name, value in values.items()
    ]


@dataclass(frozen=True)
class Straightness:
    """What `straightness` returns; 0 for lines at constant speed.

    Attributes:
        s1: `E int |z' - (x0 - x1)| ds`, the score of arXiv 2412.06403, which grows as sqrt(D).
        s1_rms: `s1 / sqrt(D)`.
        s2: `E int |z' - (x0 - x1)|^2 ds / D`.
        speed: standard deviation of `|z'|` along a path over its mean, averaged over paths.
    """

    s1: float
    s1_rms: float
    s2: float
    speed: float


@torch.no_grad()
def straightness(path: Tensor, times: Tensor) -> Straightness:
    """How far paths of a sampler are from straight lines at constant speed.

    Paths are measured in the unified frame `z_s = (1 - s) x1 + s x0`, from noise x0 at s = 1 to
    data x1 at s = 0; a path of `x_sigma = x1 + sigma x0` is there after `z = x / (1 + sigma)`,
    `s = sigma / (1 + sigma)`. In it the probability flow of EDM and that of flow matching between
    independent points are one. z' is constant between nodes, so coarse grids hide some curvature;
    `x0 - x1` is the slope of the chord from the first node to the last.

    Source: arXiv 2412.06403, table 1, whose frame is not stated.

    Args:
        path (Tensor): nodes `[K + 1, B, ...]`.
        times (Tensor): s of the nodes, `[K + 1]`, monotone.

    Returns:
        Straightness: averages over paths.

    Raises:
        ValueError: fewer than two nodes, no paths, times of another length or not monotone.

    >>> import torch
    >>> s = torch.linspace(1, 0, 11)
    >>> straightness(s[:, None, None] * torch.ones(5, 3), s).s1 < 1e-6
    True
    """
    if path.ndim < 3 or len(path) < 2 or path.numel() == 0:
        raise ValueError(f"straightness: path must be [K + 1, B, ...], got {tuple(path.shape)}")
    if times.shape != path.shape[:1]:
        raise ValueError(f"straightness: times must be ({len(path)},), got {tuple(times.shape)}")
    z, h = path.double().flatten(2), times.double().diff()[:, None]
    if not bool((h < 0).all() | (h > 0).all()):
        raise ValueError(f"straightness: times must be monotone, got {times.tolist()}")
    d, share = z.shape[2], h / h.sum()  # [K, 1], of the whole time
    slopes = z.diff(dim=0) / h[..., None]  # [K, B, D]
    chord = (z[-1] - z[0]) / h.sum()
    off = (slopes - chord).norm(dim=2)
    s1 = (share * off).sum(0).mean().item()
    s2 = (share * off.square()).sum(0).mean().item()
    speeds = slopes.norm(dim=2)
    mean = (share * speeds).sum(0)
    spread = (share * (speeds - mean).square()).sum(0).sqrt()
    at_rest = torch.finfo(torch.float64).tiny
    variation = (spread / mean.clamp_min(at_rest)).mean().item()
    return Straightness(s1, s1 / d**0.5, s2 / d, variation)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Rows of equally many cells as plain text: the first column to the left, others to the right.

    >>> print(aligned([("metric", "value"), ("recall", "0.75")]))
    metric  value
    recall   0.75
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{'>' if c else '<'}{widths[c]}}" for c, cell in enumerate(line)).rstrip()
        for line in lines
    )


def format_report(rows: Sequence[MetricRow]) -> str:
    """A `report` as an aligned plain-text table: metric, value, floor, and which way is good.

    >>> print(format_report([MetricRow("recall", 0.75, 0.9, "higher")]))
    metric  generated  real vs real  better
    recall       0.75           0.9  higher
    """
    head = ("metric", "generated", "real vs real", "better")
    cells = [head, *((r.name, f"{r.value:.3g}", f"{r.floor:.3g}", r.better) for r in rows)]
    widest = max(len(row[3]) for row in cells)
    return aligned([(*row[:3], f"{row[3]:<{widest}}") for row in cells])


def _flat(function: str, name: str, x: Tensor, least: int = 1) -> Tensor:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{function}: {name} must be a floating Tensor, got {got}")
    if x.ndim < 2 or 0 in x.shape[1:]:
        raise ValueError(f"{function}: {name} must be [n, ...], got {tuple(x.shape)}")
    if len(x) < least:
        raise ValueError(f"{function}: {name} must have at least {least} samples, got {len(x)}")
    finite = x.isfinite()
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"{function}: {name} must be finite, got {bad} NaN or inf values")
    return x.detach().double().flatten(1)


def _pair(function: str, least: int = 1, **samples: Tensor) -> tuple[Tensor, Tensor]:
    """Two named sets of samples as float64 `[n, d]` and `[m, d]`."""
    (name_x, x), (name_y, y) = samples.items()
    if isinstance(x, Tensor) and isinstance(y, Tensor) and x.device != y.device:
        raise ValueError(f"{function}: {name_y} must be on {x.device}, got {y.device}")
    flat_x, flat_y = _flat(function, name_x, x, least), _flat(function, name_y, y, least)
    if flat_x.shape[1] != flat_y.shape[1]:
        raise ValueError(
            f"{function}: {name_y} must have {flat_x.shape[1]} values per sample like {name_x}, "
            f"got {flat_y.shape[1]}"
        )
    return flat_x, flat_y


def _reference_and_query(
    function: str, real: Tensor, generated: Tensor | None, k: int
) -> tuple[Tensor, Tensor]:
    if generated is None:
        x = _flat(function, "real", real, k + 1)
        return x, x
    _flat(function, "real", real, k)
    return _pair(function, real=real, generated=generated)


def _check_k(function: str, k: int) -> None:
    if k < 1:
        raise ValueError(f"{function}: k must be at least 1, got {k}")


def _check_labels(function: str, name: str, labels: Tensor, x: Tensor) -> None:
    if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
        got = labels.dtype if isinstance(labels, Tensor) else type(labels).__name__
        raise TypeError(f"{function}: {name} must be an integer Tensor, got {got}")
    if labels.shape != x.shape[:1]:
        raise ValueError(
            f"{function}: {name} must have shape ({len(x)},), got {tuple(labels.shape)}"
        )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _draw(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random indices without repetition, with the class shares of `labels`."""
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    # Evenly spaced places in the order of the classes: shares are right to one sample.
    order = order[labels[order].argsort(stable=True)]
    return order[torch.arange(count, device=labels.device) * len(labels) // count]


def _reduced(
    x: Tensor, labels: Tensor, count: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    x, labels = x.detach(), labels.to(x.device)
    if len(x) <= count:
        return x, labels
    kept = _draw(labels, count, generator)
    return x[kept], labels[kept]


def _squared_distances(x: Tensor, y: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of `|x_i - y_j|^2`, `[rows, m]`."""
    # The expanded square cancels: centre first.
    shift = y.mean(0)
    x, y = x - shift, y - shift
    y_norms = y.square().sum(1)
    rows = max(1, _BLOCK // len(y))
    for start in range(0, len(x), rows):
        part = x[start : start + rows]
        block = torch.addmm(y_norms, part, y.T, alpha=-2)
        block += part.square().sum(1, keepdim=True)
        yield slice(start, start + len(part)), block.clamp_min_(0)


def _nearest(x: Tensor, y: Tensor, k: int, *, same: bool) -> tuple[Tensor, Tensor]:
    """Distances and indices `[n, k]` of the k nearest y of every x; never itself where `same`."""
    distances, indices = [], []
    for rows, d2 in _squared_distances(x, y):
        if same:
            d2.diagonal(rows.start).fill_(torch.inf)
        found = d2.topk(k, largest=False).indices
        # The expanded square loses the digits of a small distance: take the k anew.
        exact = [(x[rows] - y[column]).norm(dim=1) for column in found.T]
        distances.append(torch.stack(exact, dim=1))
        indices.append(found)
    return torch.cat(distances), torch.cat(indices)


def _median_distance(x: Tensor) -> float:
    x = _reduced(x, torch.zeros(len(x)), 2000, _generator(0))[0]
    d2 = torch.cat([block for _, block in _squared_distances(x, x)])
    above = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return d2[above[0], above[1]].median().sqrt().item()


def _covariance_root(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / (len(x) - 1))
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def _vote(neighbours: Tensor, asked: Tensor) -> float:
    """Share of rows of `neighbours [n, k]`, nearest first, whose majority is `asked [n]`."""
    classes, votes = torch.unique(neighbours, return_inverse=True)
    k = votes.shape[1]
    # Below one vote together, these weights decide ties for the nearest.
    weights = 1 + 0.5 ** torch.arange(1, k + 1, dtype=torch.float64, device=votes.device) / k
    # [n, classes]
    counts = torch.zeros(len(votes), len(classes), dtype=torch.float64, device=votes.device)
    counts.scatter_add_(1, votes, weights.expand_as(votes))
    return float((classes[counts.argmax(1)] == asked).double().mean())


def _networks(
    shape: torch.Size, classes: int, seed: int, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """Body `[n, *shape] -> [n, 64]` and linear head, drawn without the global generators."""
    width = _CLASSIFIER_WIDTH
    # Built without memory, hence without a draw from the global generator.
    with torch.device("meta"):
        if len(shape) == 3 and min(shape[1:]) >= 8:
            height, breadth = ((side + 3) // 4 for side in shape[1:])
            layers: list[nn.Module] = [
                nn.Conv2d(shape[0], 16, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Conv2d(16, 32, 3, stride=2, padding=1),
                nn.ReLU(),
                nn.Flatten(),
                nn.Linear(32 * height * breadth, width),
            ]
        else:
            layers = [
                nn.Flatten(),
                nn.Linear(shape.numel(), width),
                nn.ReLU(),
                nn.Linear(width, width),
            ]
        body, head = nn.Sequential(*layers, nn.ReLU()), nn.Linear(width, classes)
    generator = _generator(seed)
    for net in (body, head):
        net.float().to_empty(device="cpu")
        for weight in net.parameters():
            if weight.ndim > 1:
                nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
            else:
                nn.init.zeros_(weight)
    return body.to(device), head.to(device)
