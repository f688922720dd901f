"""Queues of real samples: the newest of each class, to draw the real points of a step from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fewstep._checks import count


class Queues:
    """The last `capacity` samples of each class, or of all samples without labels.

    A queue lets a step see more real samples of a class than a batch brings. The released code of
    arXiv 2605.11755 and 2602.04770 has queues of 128 for each class and one of 1000 for all
    classes, from which the points to be guided away from are drawn; 64 to 128 samples are pushed
    for each step.

    `state()` returns the tensors that a checkpoint keeps. Copied back, they make the same draws
    from a generator in the same state.

    Args:
        shape (Sequence): shape of a sample, such as `[C, H, W]`, or of its features.
        classes (int): number of classes; 1 for a single queue.
        capacity (int): number of samples that a queue holds.
        dtype (torch.dtype): dtype of the samples.
        device (torch.device | str | None): device of the samples.

    Raises:
        ValueError: a number is not a positive integer.

    >>> import torch
    >>> from fewstep.methods import Queues
    >>> queues = Queues((2,), classes=3, capacity=4)
    >>> queues.push(torch.arange(12.0).reshape(6, 2), torch.tensor([0, 0, 0, 0, 0, 1]))
    >>> queues.counts
    tensor([4, 1, 0])
    >>> queues.draw(2, torch.tensor([1, 0])).shape
    torch.Size([2, 2, 2])
    """

    def __init__(
        self,
        shape: Sequence[int],
        *,
        classes: int = 1,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        classes = count("Queues", "classes", classes)
        self.capacity = count("Queues", "capacity", capacity)
        self.samples = torch.zeros(classes, self.capacity, *shape, dtype=dtype, device=device)
        self.pushed = torch.zeros(classes, dtype=torch.int64)  # of each class, ever

    @property
    def counts(self) -> Tensor:
        """How many samples each class has, `[classes]`."""
        return self.pushed.clamp(max=self.capacity)

    def state(self) -> dict[str, Tensor]:
        """The live tensors: `samples [classes, capacity, ...]`, `pushed [classes]` on the CPU."""
        return {"samples": self.samples, "pushed": self.pushed}

    @torch.no_grad()
    def push(self, samples: Tensor, labels: Tensor | None = None) -> None:
        """Put samples in, which replace the oldest of their classes.

        Args:
            samples (Tensor): samples `[B, ...]`.
            labels (Tensor | None): their classes, int64 `[B]`. A single queue needs none.

        Raises:
            ValueError: shapes do not fit, or a label is of no class.
        """
        shape = tuple(self.samples.shape[2:])
        if not isinstance(samples, Tensor) or tuple(samples.shape[1:]) != shape or not samples.ndim:
            got = tuple(samples.shape) if isinstance(samples, Tensor) else type(samples).__name__
            raise ValueError(f"Queues: samples must be {('B', *shape)}, got {got}")
        if not torch.can_cast(samples.dtype, self.samples.dtype):
            raise ValueError(
                f"Queues: samples must be of a dtype that {self.samples.dtype} holds,"
                f" got {samples.dtype}"
            )
        own = self._labels(labels, "B")
        if own is None:
            own = torch.zeros(len(samples), dtype=torch.int64)
        if len(own) != len(samples):
            raise ValueError(f"Queues: labels must be ({len(samples)},), got {tuple(own.shape)}")
        for k in sorted(set(own.tolist())):
            new = (own == k).nonzero()[:, 0]
            kept = new[-self.capacity :]
            start = int(self.pushed[k]) + len(new) - len(kept)
            places = (start + torch.arange(len(kept))) % self.capacity
            device = self.samples.device
            chosen = samples.detach()[kept.to(samples.device)].to(device, self.samples.dtype)
            self.samples[k, places.to(device)] = chosen
            self.pushed[k] += len(new)

    @torch.no_grad()
    def draw(
        self,
        n: int,
        labels: Tensor | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Draw n samples of each label: without replacement where a class has as many, else with.

        Args:
            n (int): number of samples of each label.
            labels (Tensor | None): classes, int64 `[G]`. A single queue needs none.
            generator (torch.Generator | None): generator on the CPU. None takes torch's own.

        Returns:
            Tensor: samples `[G, n, ...]`, or `[n, ...]` without labels.

        Raises:
            ValueError: a label is of no class, or its class has no samples yet.
        """
        n = count("Queues", "n", n)
        own = self._labels(labels, "G")
        classes = [0] if own is None else own.tolist()
        if not classes:
            raise ValueError("Queues: labels must not be empty, got (0,)")
        counts = self.counts.tolist()
        empty = sorted({k for k in classes if counts[k] == 0})
        if empty:
            raise ValueError(f"Queues: labels must have samples, got {empty} that have none yet")
        places = torch.stack(
            [
                torch.randperm(counts[k], generator=generator)[:n]
                if counts[k] >= n
                else torch.randint(counts[k], (n,), generator=generator)
                for k in classes
            ]
        )
        rows = torch.tensor(classes)[:, None]
        device = self.samples.device
        drawn = self.samples[rows.to(device), places.to(device)]
        return drawn[0] if own is None else drawn

    def _labels(self, labels: Tensor | None, length: str) -> Tensor | None:
        """Labels on the CPU."""
        classes = len(self.samples)
        if labels is None:
            if classes > 1:
                raise ValueError(f"Queues: labels must be given for {classes} classes, got None")
            return None
        if labels.ndim != 1 or labels.is_floating_point() or labels.dtype == torch.bool:
            raise ValueError(
                f"Queues: labels must be integers ({length},), got {labels.dtype}"
                f" {tuple(labels.shape)}"
            )
        own = labels.detach().cpu().long()
        wrong = own[(own < 0) | (own >= classes)]
        if len(wrong):
            raise ValueError(
                f"Queues: labels must be from 0 to {classes - 1}, got {sorted(set(wrong.tolist()))}"
            )
        return own
