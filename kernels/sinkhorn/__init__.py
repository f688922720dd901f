"""Sinkhorn iterations and what is read off their plans."""
