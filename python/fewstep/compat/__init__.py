"""Calls of other libraries, computed by fewstep's kernels: one module for each library.

Each loads when it is imported, and none imports the library that it stands for.
"""
