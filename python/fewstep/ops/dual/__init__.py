"""Forward-mode duals: a network's own forward, run on [primal; K tangents]."""

from fewstep.ops.dual import rules
from fewstep.ops.dual.engine import Dual
from fewstep.ops.dual.traced import UnsupportedError, register

__all__ = ["Dual", "UnsupportedError", "register", "rules"]
