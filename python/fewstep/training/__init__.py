"""Training from a shell: runs, their checkpoints, pictures and tables."""
