"""What samplers are called with: wrong values are named, and numbers of every kind are taken."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fewstep
from support.denoisers import gaussian


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be an integer of at least 1, got 0"),
        ({"sigmas": [1.0, 2.0, 0.0]}, "sigmas must be finite"),
        ({"sigmas": [2.0, 1.0, -1.0]}, "sigmas must be finite"),
        ({"sigmas": [math.inf, 1.0]}, "sigmas must be finite"),
        ({"sigmas": [1.0]}, "sigmas must be"),
        ({"sigmas": torch.ones(3, 4)}, "sigmas must have 2 rows, got 3"),
        ({"S_churn": -1.0}, "S_churn must be at least 0 and finite, got -1.0"),
        ({"S_noise": math.nan}, "S_noise must be at least 0 and finite, got nan"),
        ({"guidance": 2.0}, "guidance needs uncond"),
        ({"uncond": gaussian(1.0)}, "uncond needs guidance"),
        ({"guidance": torch.ones(4)}, "guidance needs uncond"),
        ({"guidance": 0.0}, "guidance needs uncond, got guidance=0.0"),
        ({"guidance": torch.ones(3), "uncond": gaussian(1.0)}, "guidance must be finite"),
        ({"seeds": torch.arange(3)}, r"seeds must be \(2,\), got \(3,\)"),
        ({"seeds": torch.tensor([0, -1])}, "seeds must be at least 0, got -1"),
        ({"precondition": 0.0}, "precondition must be positive, got 0.0"),
        ({"state": "half"}, "state must be one of"),
        ({"sigma_min": 90.0}, "sigma_min and sigma_max"),
        ({"rho": 0.0}, "rho must be positive, got 0.0"),
        ({"log_density": torch.zeros(3)}, r"log_density must be \(2,\), got \(3,\)"),
        ({"log_density": torch.zeros(2), "S_churn": 1.0}, "S_churn must be 0"),
        ({"cuda_graph": True}, "cuda_graph needs latents on a CUDA device"),
        ({"backend": "cuda"}, "backend 'cuda' cannot serve"),
        ({"backend": "keops"}, "backend 'keops' cannot serve"),
        ({"tracker": "series"}, "tracker must be one of"),
        ({"sample_ids": torch.tensor([0, -1])}, "sample_ids must be in .* got -1"),
        ({"sample_ids": torch.tensor([2**48, 0])}, f"sample_ids must be in .* got {2**48}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input(options: dict[str, Any], message: str) -> None:
    called: list[int] = []

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        called.append(1)
        return x

    with pytest.raises(ValueError, match=message):
        fewstep.edm_sample(denoiser, torch.randn(2, 3), **options)
    assert not called


@pytest.mark.parametrize(
    "name",
    ["sigma_min", "sigma_max", "rho", "S_churn", "S_min", "S_max", "S_noise", "precondition"],
)
@pytest.mark.parametrize("value", ["a", [1.0], True])
def test_numbers_that_are_none(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"edm_sample: {name} must be a number, got "):
        fewstep.edm_sample(gaussian(1.0), torch.zeros(2, 2), steps=3, **{name: value})


def test_bad_networks_are_named_with_their_step() -> None:
    latents = torch.randn(2, 3)
    with pytest.raises(ValueError, match=r"must return \(2, 3\), got \(2, 1\) at step 0"):
        fewstep.edm_sample(lambda x, sigma: x[:, :1], latents)

    def late(x: Tensor, sigma: Tensor) -> Tensor:
        return x / 2 if float(sigma[0]) > 1 else x * math.nan

    step = int((fewstep.karras_sigmas(18)[1:] <= 1).nonzero()[0])
    with pytest.raises(ValueError, match=f"not finite at step {step}"):
        fewstep.edm_sample(late, latents)
    with pytest.raises(ValueError, match="not finite at step 1"):
        fewstep.multistep_sample(
            lambda x, s: x * math.nan if float(s[0]) < 2 else x, latents, sigmas=[2.0, 1.0]
        )
    kept = torch.empty(2, 3)
    with pytest.raises(ValueError, match="one buffer from both at step 0"):
        fewstep.edm_sample(
            lambda x, s: torch.div(x, 2, out=kept),
            latents,
            guidance=2.0,
            uncond=lambda x, s: torch.div(x, 3, out=kept),
        )
    with pytest.raises(TypeError, match="floating"):
        fewstep.edm_sample(gaussian(1.0), torch.ones(2, 3, dtype=torch.int64))
    for times in ([0.0, 1.0], [1.5, 0.0], [1.0, -0.5]):
        with pytest.raises(ValueError, match="times must decrease"):
            fewstep.flow_sample(gaussian(1.0), latents, times=times)
    with pytest.raises(ValueError, match=r"times must be finite .* got 0.5 and then 0.5 at step 1"):
        fewstep.flow_sample(gaussian(1.0), latents, times=[1.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="sigmas must be positive and decreasing"):
        fewstep.multistep_sample(gaussian(1.0), latents, sigmas=[1.0, 0.0])
    with pytest.raises(ValueError, match="mode must be one of"):
        fewstep.multistep_sample(gaussian(1.0), latents, sigmas=[1.0], mode="none")
    for steps, grid in (([0, 0], "edm_subset"), ([0, 18], "edm_subset"), ([1], "uniform_s")):
        with pytest.raises(ValueError, match="steps must be"):
            fewstep.few_step_sigmas(steps, grid=grid)


def test_wrong_types_are_named() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"seeds must be an int64 tensor, got torch.float32"):
        fewstep.latents(torch.zeros(2), (3,))
    for seeds, got in (([1, 2], "list"), (3, "int")):
        with pytest.raises(TypeError, match=f"seeds must be an int64 tensor, got {got}"):
            fewstep.latents(seeds, (3,))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=f"seeds must be an int64 tensor, got {got}"):
            fewstep.edm_sample(gaussian(1.0), x, seeds=seeds, S_churn=1.0)
    with pytest.raises(TypeError, match=r"dtype must be floating, got torch.int64"):
        fewstep.latents(torch.arange(2), (3,), dtype=torch.int64)
    with pytest.raises(ValueError, match=r"seeds must be \[B\], got \(\)"):
        fewstep.latents(torch.tensor(2), (3,))
    for sample in (
        lambda latents: fewstep.edm_sample(gaussian(1.0), latents),
        lambda latents: fewstep.flow_sample(gaussian(1.0), latents),
        lambda latents: fewstep.multistep_sample(gaussian(1.0), latents, sigmas=[1.0]),
    ):
        with pytest.raises(TypeError, match="latents must be a tensor, got tuple"):
            sample((x, x))  # type: ignore[arg-type]
    for options, name in (
        ({"sigmas": "many"}, "sigmas must be numbers, got 'many'"),
        ({"guidance": "much", "uncond": gaussian(1.0)}, "guidance must be numbers, got 'much'"),
        ({"sample_ids": [0, 1]}, "sample_ids must be int64, got list"),
        ({"log_density": torch.zeros(2, dtype=torch.int64)}, "log_density must be .* floating"),
        ({"log_density": 0.0}, "log_density must be a tensor"),
    ):
        with pytest.raises(TypeError, match=name):
            fewstep.edm_sample(gaussian(1.0), x, **options)


WRONG_NUMBER = ("a", True, None, 1j, [1.0], torch.ones(2), np.array(["a"]), torch.tensor(True))
WRONG_FLAG = ("no", 0, None, torch.ones(2))
SAMPLE = {"latents": torch.zeros(2, 3)}
# The functions of this room, what they are called with, and what an argument must not be.
WRONG: list[tuple[Any, dict[str, Any], str, tuple[Any, ...]]] = [
    *(
        (fewstep.edm_sample, {"denoiser": gaussian(1.0), **SAMPLE}, name, values)
        for name, values in {
            "denoiser": ("a", None, 1),
            "latents": ("a", None, [1.0], torch.eye(2).to_sparse(), torch.ones(2).bool()),
            "steps": ("a", True, None, 2.5, -1, 10**400, 2**63, [1]),
            "sigmas": ("a", True, [1, "a"], [True, False], torch.ones(2) * 1j, [10**400, 1], 3.0),
            "precondition": ("a", True, [0.5], -1.0, math.nan, 10**400, 1e300, torch.ones(2)),
            "guidance": ("a", True, 1j, math.nan, np.array(["a"])),
            "uncond": ("a", 1.0),
            "seeds": ("a", 1, [1, 2], torch.ones(2)),
            "state": (None, True, ["float32"], torch.ones(2)),
            "tracker": (None, True, ["trace"], np.ones(2)),
            "estimator": (None, "a", ["exact"], np.ones(2)),
            "probes": (0, "a", None, True, 1.5),
            "log_density": ("a", True, torch.ones(2) * 1j, torch.eye(2).to_sparse()),
            "cuda_graph": WRONG_FLAG,
            "progress": WRONG_FLAG,
            "check_finite": ("no", 0, torch.ones(2)),
            "backend": ("gpu", 0, False, [], torch.ones(2)),
            **dict.fromkeys(("sigma_min", "sigma_max"), (*WRONG_NUMBER, math.nan, -1.0)),
            "rho": (*WRONG_NUMBER, math.nan, -1.0, 10**400, 1e-320, 1e300),
            **dict.fromkeys(("S_churn", "S_noise"), (*WRONG_NUMBER, math.nan, -1, math.inf)),
            **dict.fromkeys(("S_min", "S_max"), (*WRONG_NUMBER, math.nan)),
        }.items()
    ),
    *(
        (fewstep.flow_sample, {"velocity": gaussian(1.0), **SAMPLE}, name, values)
        for name, values in {
            "velocity": ("a", None, 1),
            "latents": ("a", None, torch.eye(2).to_sparse()),
            "steps": ("a", True, None, 2.5, 0, 10**400),
            "times": ("a", True, 3.0, [1, "a"], [10**400, 0]),
            "uncond": ("a", 1.0),
            "progress": WRONG_FLAG,
            "check_finite": ("no", 0, torch.ones(2)),
            "backend": ("gpu", 0, []),
            **dict.fromkeys(("S_churn", "S_noise"), (*WRONG_NUMBER, math.nan, -1, math.inf)),
            **dict.fromkeys(("S_min", "S_max"), (*WRONG_NUMBER, math.nan)),
        }.items()
    ),
    *(
        (
            fewstep.multistep_sample,
            {"network": gaussian(1.0), "sigmas": [4.0, 1.0], **SAMPLE},
            name,
            values,
        )
        for name, values in {
            "network": ("a", None, 1),
            "sigmas": ("a", None, 1.0, [True], [1.0, 2.0], [math.nan], torch.eye(2)),
            "mode": (None, "a", ["line"], torch.ones(2)),
            "check_finite": ("no", 0, torch.ones(2)),
            "backend": ("gpu", 0, []),
        }.items()
    ),
    *(
        (fewstep.karras_sigmas, {"steps": 3}, name, values)
        for name, values in {
            "steps": ("a", True, None, 2.5, 0, 10**400),
            "sigma_min": (*WRONG_NUMBER, 0, math.nan),
            "sigma_max": (*WRONG_NUMBER, math.inf, 10**400),
            "rho": (*WRONG_NUMBER, 0, 1e-320, 1e300),
            "dtype": ("a", None, torch.int32, torch.complex64),
            "device": ("a", 1.5, "cuda:99"),
        }.items()
    ),
    *(
        (fewstep.few_step_sigmas, {"steps": 3, "grid": grid}, name, values)
        for grid in ("edm_subset", "uniform_s")
        for name, values in {
            "steps": ("a", True, None, 2.5, 0, [0, 1.5], [True], [-1, 0], torch.ones(2), {}),
            "grid": (None, "a", ["uniform_s"], np.ones(2)),
            "teacher_steps": ("a", None, 0, 1.5),
            "sigma_min": (*WRONG_NUMBER, 0, math.nan),
            "sigma_max": (*WRONG_NUMBER, -1.0, math.nan, math.inf),
            "rho": (*WRONG_NUMBER, 0, math.nan),
        }.items()
    ),
    *(
        (fewstep.latents, {"seeds": torch.arange(2), "shape": (3,)}, name, values)
        for name, values in {
            "seeds": ("a", 1, torch.ones(2), torch.tensor([-1])),
            "shape": (2, None, "a", (-1,), (2.5,), (True,), {}, b"x", (2, 10**400)),
            "dtype": (None, "float32", torch.int32),
            "backend": ("gpu", 0, []),
        }.items()
    ),
]


def _words(value: Any) -> Iterator[str]:
    """What an error may say of a value: itself, one of its elements, its type, dtype or shape."""
    yield from (repr(value), type(value).__name__)
    if isinstance(value, list | tuple):
        yield from map(repr, value)
    elif hasattr(value, "dtype"):
        yield from (str(value.dtype), str(tuple(value.shape)))
        if getattr(value, "layout", torch.strided) == torch.strided:
            yield from (str(value.tolist()), *map(repr, value.flatten()))
            yield from map(repr, value.flatten().tolist())
        else:
            yield str(value.layout)
    elif isinstance(value, float):
        yield "()"  # the shape of a number where several are wanted


@pytest.mark.parametrize(
    ("function", "given", "name", "values"),
    WRONG,
    ids=[f"{function.__name__}-{name}-{i}" for i, (function, _, name, _) in enumerate(WRONG)],
)
def test_wrong_values_are_named(
    function: Any, given: dict[str, Any], name: str, values: tuple[Any, ...]
) -> None:
    """By the function that was called, the argument and the value, before the network runs."""
    called: list[int] = []
    network = next(iter(given))
    if callable(given[network]):
        given = {**given, network: lambda x, t: called.append(1) or x}
    for value in values:
        with pytest.raises((ValueError, TypeError), match=f"^{function.__name__}: .*{name}") as e:
            function(**{**given, name: value})
        got = str(e.value).split(": ", 1)[1]
        assert any(part in got for part in _words(value)), e.value
    assert not called


def test_a_backend_that_is_none_of_theirs_is_answered_with_theirs() -> None:
    theirs = r"\('reference', 'cpp', 'cuda', 'triton'\), got 'gpu'"
    with pytest.raises(ValueError, match=f"edm_sample: backend must be one of {theirs}"):
        fewstep.edm_sample(gaussian(1.0), torch.randn(2, 3), backend="gpu")
    with pytest.raises(ValueError, match=r"latents: backend 'keops' cannot serve"):
        fewstep.latents(torch.arange(2), (3,), backend="keops")


@pytest.mark.parametrize("number", [np.float64(2.0), np.float32(2.0), np.array(2.0), Fraction(2)])
def test_numbers_of_all_kinds_are_taken(number: Any) -> None:
    x = torch.randn(2, 3)
    for name in ("sigma_max", "rho", "S_churn", "S_noise", "S_max", "precondition"):
        own = fewstep.edm_sample(
            gaussian(1.0), x, seeds=torch.arange(2), **{"S_churn": 1.0, name: number}
        )
        same = fewstep.edm_sample(
            gaussian(1.0), x, seeds=torch.arange(2), **{"S_churn": 1.0, name: 2.0}
        )
        assert torch.equal(own, same)


def test_numpy_integers_are_taken() -> None:
    x, five = torch.randn(2, 3), np.int64(5)
    for sample in (fewstep.edm_sample, fewstep.flow_sample):
        assert torch.equal(sample(gaussian(1.0), x, steps=five), sample(gaussian(1.0), x, steps=5))
    assert torch.equal(fewstep.karras_sigmas(five), fewstep.karras_sigmas(5))
    assert torch.equal(fewstep.few_step_sigmas(five), fewstep.few_step_sigmas(5))
    options: dict[str, Any] = {"estimator": "hutchinson", "probes": np.int64(2), "seed": five}
    own = fewstep.divergence(gaussian(1.0), x, 0.5, **options).value
    assert torch.equal(
        own, fewstep.divergence(gaussian(1.0), x, 0.5, **options | {"probes": 2, "seed": 5}).value
    )


@pytest.mark.parametrize(
    "network", [lambda x, t: x.mul_(0.5), lambda x, t: F.silu(x, inplace=True)]
)
def test_networks_that_change_their_input(network: Callable[..., Tensor]) -> None:
    """It may be the state of the solver."""
    x = torch.randn(3, 2)
    calls: list[Callable[[], object]] = [
        lambda: fewstep.edm_sample(network, x.clone(), steps=3),
        lambda: fewstep.edm_sample(network, x.clone(), steps=3, guidance=2.0, uncond=network),
        lambda: fewstep.flow_sample(network, x.clone(), steps=3),
        lambda: fewstep.multistep_sample(network, x.clone(), sigmas=[80.0, 1.0]),
        lambda: fewstep.heun_solve(network, x.clone(), [0.0, 0.5, 1.0]),
        lambda: fewstep.heun_step(network, x.clone(), 0.0, 0.1),
    ]
    for call in calls:
        with torch.no_grad(), pytest.raises(ValueError, match="changes its input in place"):
            call()
