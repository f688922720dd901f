"""A rule per torch function; importing this package registers them all."""

from fewstep.ops.dual.rules import (
    attention,
    complex,
    composite,
    elementwise,
    linear,
    moved,
    norms,
    resampling,
    shapes,
)

__all__ = [
    "attention",
    "complex",
    "composite",
    "elementwise",
    "linear",
    "moved",
    "norms",
    "resampling",
    "shapes",
]
