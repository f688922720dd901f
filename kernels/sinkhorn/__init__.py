"""Sinkhorn iterations and what is read off their plans; importing this registers the ops."""

from . import apply, solve

__all__ = ["apply", "solve"]
