"""Losses of other methods, in the form in which they work, to compare with."""

from fewstep.baselines.drifting import Drifting
from fewstep.baselines.kernels import KernelFlow

__all__ = ["Drifting", "KernelFlow"]
