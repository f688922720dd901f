"""Heun's method: single steps, whole solves, and the kernels behind the samplers."""
