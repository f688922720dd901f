"""The losses of training methods, as small objects that are called with networks and a batch."""

from fewstep.methods.lines import LinesMatching
from fewstep.methods.meanflow import MeanFlow, meanflow_sample
from fewstep.methods.reflow import MarginalReflow
from fewstep.methods.wflow import WFlow

__all__ = ["LinesMatching", "MarginalReflow", "MeanFlow", "WFlow", "meanflow_sample"]
