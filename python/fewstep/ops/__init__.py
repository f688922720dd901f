"""Public functions: each validates its arguments, chooses a backend and carries the gradient."""
