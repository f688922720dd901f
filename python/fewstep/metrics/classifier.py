"""A small classifier, and the Frechet distance of its features."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fewstep._torch import exactly, one_thread
from fewstep.metrics.distances import frechet_distance
from fewstep.metrics.samples import check_labels, flattened, generator_of, pair

_CLASSIFIER_STEPS, _CLASSIFIER_BATCH, _CLASSIFIER_WIDTH = 200, 128, 64


@one_thread()
@torch.inference_mode(mode=False)
def classifier_features(
    images: Tensor, labels: Tensor, *, seed: int = 0
) -> Callable[[Tensor], Tensor]:
    """Train a small classifier and return the map to its penultimate features.

    For images `[n, C, H, W]` of 8 x 8 pixels and more the classifier has two strided convolutions
    and a layer of 64 ReLU features. For other samples it has two layers of 64. It trains for 200
    steps of Adam, about 2 s for 28 x 28 on one thread. The same seed gives the same bits on one
    machine.

    Args:
        images (Tensor): samples `[n, ...]`, of any scale.
        labels (Tensor): integers `[n]` of at least two classes.
        seed (int): seed of the initial weights and the batches.

    Returns:
        Callable: a map from samples `[m, ...]` to features float32 `[m, 64]`.

    Raises:
        ValueError: empty, not finite, labels of another length or of one class.
        TypeError: not a floating tensor, labels that are not integers.

    >>> import torch
    >>> images = torch.eye(4).repeat(8, 1)
    >>> classifier_features(images, torch.arange(32) % 4)(images).shape
    torch.Size([32, 64])
    """
    flat = flattened("classifier_features", "images", images)
    check_labels("classifier_features", "labels", labels, flat)
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
    generator = generator_of(seed)
    # Callers may be inside no_grad or autocast.
    with (
        torch.enable_grad(),
        exactly(device),
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
        with torch.no_grad(), exactly(device):
            return torch.cat([body(prepare(part)) for part in torch.split(x, 1024)])

    return features


def frechet_local(real: Tensor, generated: Tensor, real_labels: Tensor, *, seed: int = 0) -> float:
    """FD-local: `frechet_distance` in the features of a classifier trained here on `real`.

    The features, and with them the unit, depend on the real samples and the seed. Compare figures
    of one classifier only, at equal sizes. `report` shows the floor of the same classifier too.

    Source: Heusel et al., GANs trained by a two time-scale update rule (2017), equation 6, with the
    features of `classifier_features` in place of Inception's.

    Args:
        real (Tensor): samples `[n, ...]`, the classifier's training set.
        generated (Tensor): samples `[m, ...]`.
        real_labels (Tensor): integers `[n]`.
        seed (int): seed of the classifier.

    Returns:
        float: distance in squared units of the features.

    Raises:
        ValueError: fewer than 2 samples, not finite, unequal d or device, labels of another length
            or of one class.
        TypeError: not a floating tensor, labels that are not integers.

    >>> import torch
    >>> real = torch.eye(4).repeat(8, 1)
    >>> round(frechet_local(real, real, torch.arange(32) % 4), 6)
    0.0
    """
    pair("frechet_local", least=2, real=real, generated=generated)
    check_labels("frechet_local", "real_labels", real_labels, real)
    features = classifier_features(real, real_labels, seed=seed)
    return frechet_distance(features(real), features(generated))


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
    generator = generator_of(seed)
    for net in (body, head):
        net.float().to_empty(device="cpu")
        for weight in net.parameters():
            if weight.ndim > 1:
                nn.init.kaiming_uniform_(weight, nonlinearity="relu", generator=generator)
            else:
                nn.init.zeros_(weight)
    return body.to(device), head.to(device)
