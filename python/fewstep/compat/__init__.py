"""Calls of other libraries, computed by fewstep's kernels: one module for each library."""
