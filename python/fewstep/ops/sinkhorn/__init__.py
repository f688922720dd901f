"""Entropic optimal transport between point clouds."""
