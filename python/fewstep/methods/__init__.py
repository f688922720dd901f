"""The losses of training methods, as small objects that are called with networks and a batch."""

from fewstep.methods import features
from fewstep.methods.guidance import sample_scales
from fewstep.methods.lines import LinesMatching
from fewstep.methods.meanflow import MeanFlow, meanflow_sample
from fewstep.methods.queues import Queues
from fewstep.methods.reflow import MarginalReflow
from fewstep.methods.wflow import WFlow

__all__ = [
    "LinesMatching",
    "MarginalReflow",
    "MeanFlow",
    "Queues",
    "WFlow",
    "features",
    "meanflow_sample",
    "sample_scales",
]
