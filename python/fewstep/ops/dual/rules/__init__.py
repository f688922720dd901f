"""A rule per torch function; importing this package registers them all."""

from fewstep.ops.dual.rules import attention, elementwise, linear, norms, resampling, shapes

__all__ = ["attention", "elementwise", "linear", "norms", "resampling", "shapes"]
