"""Data sets: images, toys, and pairs of noise and a teacher's images."""

from fewstep.data.images import Images, load

__all__ = ["Images", "load"]
