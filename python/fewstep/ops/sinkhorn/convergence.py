"""The warning of results that have not converged."""

from __future__ import annotations

import torch
from torch import Tensor

from fewstep._torch import is_transformed


class ConvergenceWarning(UserWarning):
    """A result was asked for before its iterations had converged."""


def unconverged(converged: Tensor) -> bool:
    """Whether some problem has not, as far as looking costs nothing."""
    if torch.compiler.is_compiling() or converged.device.type != "cpu" or is_transformed():
        return False
    return not bool(converged.all())
