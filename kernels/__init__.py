"""Triton kernels; imported lazily, since importing them imports triton."""
