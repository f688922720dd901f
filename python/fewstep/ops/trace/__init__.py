"""Traces of Jacobians, and the log-densities that follow from them."""
