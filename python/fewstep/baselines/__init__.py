"""Losses of other methods, in the form in which they work, to compare with.

PeRFlow is `fewstep.methods.MarginalReflow(lam=0)`.
"""

from fewstep.baselines.drifting import Drifting
from fewstep.baselines.flows import FlowMatching, optimal_assignment
from fewstep.baselines.kernels import KernelFlow

__all__ = ["Drifting", "FlowMatching", "KernelFlow", "optimal_assignment"]
