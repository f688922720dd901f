"""Samplers: EDM's, of flows, and few-step ones."""
