"""Whether this device computes right with the kernels, and which of them then serve it."""
