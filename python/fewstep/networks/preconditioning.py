"""Denoisers and predictors of endpoints from raw networks."""

from __future__ import annotations

import math

from torch import Tensor, nn

from fewstep.networks.mlp import like


class EDMPrecond(nn.Module):
    """A denoiser from a raw network, `D(x, sigma) = c_skip x + c_out F(c_in x, ln(sigma) / 4)`.

    With `r^2 = sigma^2 + sigma_data^2` the coefficients are `c_skip = sigma_data^2 / r^2`,
    `c_out = sigma sigma_data / r` and `c_in = 1 / r`. The kernels of the sampler can do the same to
    the raw network, by `fewstep.edm_sample(d.network, latents, precondition=d.sigma_data)`.

    Source: Karras et al., EDM, arXiv 2206.00364, table 1.

    Args:
        network (nn.Module): raw network `F(x [B, ...], t [B], *condition)`.
        sigma_data (float): standard deviation of the data.

    >>> import torch
    >>> from fewstep.networks import EDMPrecond, ResidualMLP
    >>> denoiser = EDMPrecond(ResidualMLP((2,)), sigma_data=0.5)
    >>> denoiser(torch.ones(1, 2), torch.tensor([0.5]))  # F starts at 0
    tensor([[0.5000, 0.5000]], grad_fn=<AddBackward0>)
    """

    def __init__(self, network: nn.Module, *, sigma_data: float = 0.5) -> None:
        super().__init__()
        if not 0 < sigma_data < math.inf:
            raise ValueError(
                f"EDMPrecond: sigma_data must be positive and finite, got {sigma_data}"
            )
        self.network = network
        self.sigma_data = sigma_data

    def extra_repr(self) -> str:
        return f"sigma_data={self.sigma_data}"

    def forward(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """Map x `[B, ...]` and sigma `[B]` to denoised images `[B, ...]`."""
        wide = sigma.reshape(-1, *(1,) * (x.ndim - 1))
        square = wide.square() + self.sigma_data**2
        skip, scale = self.sigma_data**2 / square, wide * self.sigma_data * square.rsqrt()
        out = self.network(x * like(square.rsqrt(), x), sigma.log() / 4, *condition)
        denoised: Tensor = like(skip, x) * x + like(scale, x) * out
        return denoised


class LinePrecond(nn.Module):
    """An endpoint predictor with the skip of the unified frame, `N(x, sigma) = z - s F(z, s)`.

    Here `z = x / (1 + sigma)` and `s = sigma / (1 + sigma)`. On the line `z = (1 - s) x1 + s x0`
    the right F is `x0 - x1` at every s. Coordinates that the map leaves alone therefore cost F
    nothing. With a squared error, N is 2-rectified flow with weight s^2.

    Args:
        network (nn.Module): raw network `F(z [B, ...], s [B], *condition)`.

    >>> import torch
    >>> from fewstep.networks import LinePrecond, ResidualMLP
    >>> predictor = LinePrecond(ResidualMLP((2,)))
    >>> predictor(torch.ones(1, 2), torch.ones(1))  # F starts at 0
    tensor([[0.5000, 0.5000]], grad_fn=<SubBackward0>)
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, sigma: Tensor, *condition: Tensor) -> Tensor:
        """Map x `[B, ...]` and sigma `[B]` to endpoints `[B, ...]`."""
        s = sigma / (1 + sigma)
        wide = s.reshape(-1, *(1,) * (x.ndim - 1))
        z = x * like(1 - wide, x)
        out: Tensor = z - like(wide, x) * self.network(z, s, *condition)
        return out
