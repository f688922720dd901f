"""Plain torch definitions of every op: any float dtype, any device, differentiable twice."""
