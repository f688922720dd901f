"""Features of samples, for losses that compare clouds in feature spaces.

A loss takes features of three shapes: vectors `[B, C]`, tokens `[B, L, C]` and maps `[B, C, H, W]`.
Each of the L or H W locations is a problem of its own. The functions here make such features of the
maps of an encoder, and `around` puts them together as arXiv 2602.04770 has them in Appendix A.5.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fewstep._checks import count, function
from fewstep._torch import wide
from fewstep.methods.problems import Features, named

_MIN_VARIANCE = 1e-6


def locations(maps: Tensor) -> Tensor:
    """The vector of each location: `[B, C, H, W]` to `[B, H W, C]`; tokens as they are."""
    return maps.flatten(2).transpose(1, 2) if maps.ndim == 4 else maps


def mean(maps: Tensor, size: int | None = None) -> Tensor:
    """The mean over each patch of `size x size` locations, which do not overlap.

    Args:
        maps (Tensor): maps `[B, C, H, W]` or, without size, tokens `[B, L, C]`.
        size (int | None): width of a patch, a divisor of H and W. None takes all locations.

    Returns:
        Tensor: `[B, H W / size^2, C]`, or `[B, C]` without size.

    Raises:
        ValueError: size does not divide H and W, or maps have another rank.

    >>> import torch
    >>> from fewstep.methods import features
    >>> maps = torch.randn(5, 16, 8, 4)
    >>> features.mean(maps).shape, features.mean(maps, 2).shape
    (torch.Size([5, 16]), torch.Size([5, 8, 16]))
    """
    return _over_patches("mean", maps, size, lambda t, dims: t.mean(dims))


def std(maps: Tensor, size: int | None = None) -> Tensor:
    """`sqrt(var + 1e-6)` over each patch, with the arguments, shapes and errors of `mean`.

    The summand keeps the gradient finite where a patch is constant.
    """

    def spread(t: Tensor, dims: tuple[int, ...]) -> Tensor:
        return (t.var(dims, correction=0) + _MIN_VARIANCE).sqrt()

    return _over_patches("std", maps, size, spread)


def patch_vectors(samples: Tensor, size: int) -> Tensor:
    """All values of each patch of `size x size` pixels, which do not overlap.

    Args:
        samples (Tensor): images or maps `[B, C, H, W]`.
        size (int): width of a patch, a divisor of H and W.

    Returns:
        Tensor: `[B, H W / size^2, C size^2]`.

    Raises:
        ValueError: size does not divide H and W, or samples have another rank.

    >>> import torch
    >>> from fewstep.methods import features
    >>> features.patch_vectors(torch.randn(5, 3, 8, 4), 2).shape
    torch.Size([5, 8, 12])
    """
    return (
        _blocks("patch_vectors", "samples", samples, size)
        .permute(0, 2, 4, 1, 3, 5)
        .reshape(len(samples), -1, samples.shape[1] * size**2)
    )


def channel_rms(samples: Tensor) -> Tensor:
    """`sqrt(mean of squares + 1e-6)` of each channel: `[B, C, ...]` to `[B, C]`."""
    if samples.ndim < 3:
        raise ValueError(f"channel_rms: samples must be [B, C, ...], got {tuple(samples.shape)}")
    own = samples.to(wide(samples.dtype)).flatten(2)
    return (own.square().mean(2) + _MIN_VARIANCE).sqrt()


def around(
    encoder: Features | None = None,
    *,
    vectors: bool = True,
    whole: bool = True,
    patches: Sequence[int] = (2, 4),
    input_rms: bool = True,
    raw: bool = True,
) -> Callable[[Tensor], dict[str, Tensor]]:
    """A function from samples to features, for `features=` of a loss.

    Each map of the encoder gives the types of the table, and so does the raw sample. Put the
    encoder into evaluation mode, and freeze its parameters with `requires_grad_(False)`.

    | type | shape | what |
    |---|---|---|
    | `NAME` | `[B, H W, C]` | the vector of each location |
    | `NAME/mean`, `NAME/std` | `[B, C]` | over all locations |
    | `NAME/mean2`, `NAME/std2`, and so on | `[B, H W / 4, C]` | over patches of 2 x 2 locations |
    | `input/rms` | `[B, C]` | root mean square of each channel of the sample |
    | `input` | `[B, D]` | all values of the sample |

    Of tokens `[B, L, C]` there are no patches, and vectors `[B, C]` are taken as they are. A patch
    as large as a map, or larger, is left out.

    Source: arXiv 2602.04770, Appendix A.5; arXiv 2605.11755 takes the same features.

    Args:
        encoder (Callable | None): maps samples `[B, ...]` to a tensor, or a list or dict of them.
        vectors (bool): take the vector of each location.
        whole (bool): take mean and standard deviation over all locations.
        patches (Sequence): widths of patches.
        input_rms (bool): take the root mean square of each channel of the samples `[B, C, ...]`.
        raw (bool): take the sample itself.

    Returns:
        Callable: maps samples to a dict of features.

    Raises:
        ValueError: there would be no features, a patch does not divide a map, or the encoder
            returns something else.
        TypeError: encoder is not callable.

    >>> import torch
    >>> from fewstep.methods import features
    >>> encoder = torch.nn.Conv2d(1, 16, 3, padding=1)
    >>> found = features.around(encoder, patches=(4,))(torch.randn(5, 1, 8, 8))
    >>> {name: tuple(t.shape[1:]) for name, t in found.items() if "std" not in name}
    {'map': (64, 16), 'map/mean': (16,), 'map/mean4': (4, 16), 'input/rms': (1,), 'input': (64,)}
    """
    if encoder is not None:
        function("around", "encoder", encoder)
    sizes = [count("around", "patches", size, 2) for size in patches]
    if not (input_rms or raw or (encoder is not None and (vectors or whole or sizes))):
        raise ValueError("around: must take some features, got encoder None or no types")

    def features(samples: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        maps = {} if encoder is None else named("around", "encoder", encoder(samples))
        for name, t in maps.items():
            name = name or "map"
            if t.ndim not in (2, 3, 4):
                raise ValueError(
                    f"around: encoder must return [B, C], [B, L, C] or [B, C, H, W] as {name!r},"
                    f" got {tuple(t.shape)}"
                )
            if vectors or t.ndim == 2:
                found[name] = locations(t)
            if whole and t.ndim > 2:
                found |= {f"{name}/mean": mean(t), f"{name}/std": std(t)}
            for size in sizes if t.ndim == 4 else []:
                if size < max(t.shape[2:]):
                    found |= {
                        f"{name}/mean{size}": mean(t, size),
                        f"{name}/std{size}": std(t, size),
                    }
        if input_rms:
            found["input/rms"] = channel_rms(samples)
        if raw:
            found["input"] = samples.flatten(1)
        return found

    return features


def _over_patches(
    who: str,
    maps: Tensor,
    size: int | None,
    reduce: Callable[[Tensor, tuple[int, ...]], Tensor],
) -> Tensor:
    if size is not None:
        blocks = _blocks(who, "maps", maps, size)
        return locations(reduce(blocks.to(wide(maps.dtype)), (3, 5)))
    if maps.ndim not in (3, 4):
        raise ValueError(f"{who}: maps must be [B, C, H, W] or [B, L, C], got {tuple(maps.shape)}")
    return reduce(maps.to(wide(maps.dtype)), (1,) if maps.ndim == 3 else (2, 3))


def _blocks(who: str, name: str, maps: Tensor, size: int) -> Tensor:
    """`[B, C, H / size, size, W / size, size]`."""
    size = count(who, "size", size)
    if maps.ndim != 4:
        raise ValueError(f"{who}: {name} must be [B, C, H, W], got {tuple(maps.shape)}")
    b, c, h, w = maps.shape
    if h % size or w % size:
        raise ValueError(f"{who}: size must divide H and W, got {size} and {tuple(maps.shape)}")
    return maps.reshape(b, c, h // size, size, w // size, size)
