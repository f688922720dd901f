"""The warning of results that have not converged."""

from __future__ import annotations

from torch import Tensor

from fewstep._torch import readable


class ConvergenceWarning(UserWarning):
    """A result was asked for before its iterations had converged."""


def unconverged(converged: Tensor) -> bool:
    """Whether some problem has not, as far as looking costs nothing."""
    return readable(converged) and not bool(converged.all())
