"""Losses of other methods, in the form in which they work, to compare with."""

from fewstep.baselines.drifting import Drifting

__all__ = ["Drifting"]
