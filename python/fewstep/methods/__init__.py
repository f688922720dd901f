"""Training methods: small callable objects, `(networks, batch) -> loss`."""

from fewstep.methods.lines import LinesMatching
from fewstep.methods.reflow import MarginalReflow
from fewstep.methods.wflow import WFlow

__all__ = ["LinesMatching", "MarginalReflow", "WFlow"]
