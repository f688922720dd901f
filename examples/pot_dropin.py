"""Colours of one image carried over to another by entropic transport, as POT computes it.

What is replaced: one line, the import. Before it was `import ot as pot`.
"""

from __future__ import annotations

import numpy as np

from fewstep.compat import pot


def main() -> None:
    rng = np.random.default_rng(0)
    source = rng.beta(2, 5, (600, 3))  # colours of pixels, dark
    target = rng.beta(5, 2, (500, 3))  # and bright
    a, b = pot.unif(600), pot.unif(500)

    result = pot.solve_sample(source, target, a, b, reg=0.02)
    print(f"{result.status}: <P, M> = {result.value_linear:.4f}, objective {result.value:.4f}")
    moved = result.plan @ target / a[:, None]
    print(f"mean colour {source.mean(0).round(2)} -> {moved.mean(0).round(2)}")
    assert np.allclose(moved.mean(0), target.mean(0), atol=1e-6)

    costs = ((source[:, None] - target) ** 2).sum(-1)
    plan, log = pot.sinkhorn(a, b, costs, reg=0.02, log=True)
    print(f"the same by its costs, after {log['niter'] + 1} iterations")
    assert np.allclose(plan, result.plan, atol=1e-9)

    kept = pot.sinkhorn_unbalanced(a, b, costs, reg=0.02, reg_m=0.05)
    print(f"where mass may be dropped, {kept.sum():.0%} of it stays")


if __name__ == "__main__":
    main()
