"""Networks and schedulers of diffusers: the library's own formulas and steps, in float64."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fewstep
from fewstep.compat import diffusers as compat
from fewstep.data.generate import generate
from fewstep.data.pairs import PairDataset, PairsConfig
from fewstep.methods import LinesMatching, MarginalReflow
from support import diffusers_networks as networks
from support import rows
from tolerances import assert_contract

diffusers = pytest.importorskip("diffusers")
# Of diffusers, which hands tensors to NumPy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ impl", "ignore:__array_wrap__ must")
F64 = torch.float64
PREDICTIONS = ("epsilon", "sample", "v_prediction")


class Net(nn.Module):
    """Called as diffusers' networks are, and smooth in both of its inputs."""

    def __init__(self, dtype: torch.dtype = F64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.a, self.b = nn.Linear(4, 16, dtype=dtype), nn.Linear(16, 4, dtype=dtype)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=F64).to(dtype) / 3
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, timestep: Tensor, shift: Tensor | float = 0.0) -> tuple[Tensor]:
        t = timestep.to(x.dtype).expand(x.shape[0])
        self.seen.append(timestep)
        return (self.b(torch.tanh(self.a(x) + (t / 300).sin()[:, None] + shift)),)


def points(n: int = 5, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(n, 4, generator=torch.Generator().manual_seed(2), dtype=F64).to(dtype)


def heun(scheduler: Any, net: nn.Module, x: Tensor) -> Tensor:
    """The library's loop; sigmas are float32, and here what is computed of them is not."""
    scheduler.sigmas = scheduler.sigmas.to(x.dtype)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), t)[0]
        x = scheduler.step(out, t, x).prev_sample
    return x


def levels(scheduler: Any) -> Tensor:
    """Of a Heun scheduler, which repeats them."""
    return torch.cat((scheduler.sigmas[:1], scheduler.sigmas[1::2])).double()


BETAS = {"beta_start": 0.0001, "beta_end": 0.02, "timestep_spacing": "trailing"}


@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_heun_trajectories(prediction: str, karras: bool) -> None:
    """Karras's levels lie between timesteps, which both interpolate."""
    net = Net()
    scheduler = diffusers.HeunDiscreteScheduler(
        **BETAS, prediction_type=prediction, use_karras_sigmas=karras
    )
    scheduler.set_timesteps(8)
    expected = heun(scheduler, net, points())
    D = compat.denoiser(net, scheduler)
    net.seen.clear()
    found = fewstep.edm_sample(D, points(), sigmas=levels(scheduler), state="float64")
    times = torch.stack([t[0] for t in net.seen])
    assert (times - scheduler.timesteps).abs().max() < 1e-4  # which are float32
    assert (found - expected).norm() / expected.norm() < (1e-6 if karras else 1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_euler_steps(prediction: str) -> None:
    """Euler's schedulers compute in float32; the same formulas by hand in float64."""
    net = Net()
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, prediction_type=prediction)
    scheduler.set_timesteps(8)
    D = compat.denoiser(net, scheduler)
    x = points() * scheduler.init_noise_sigma.double()
    sigmas = scheduler.sigmas.double()
    for k, t in enumerate(scheduler.timesteps):
        sigma, after = sigmas[k], sigmas[k + 1]
        out = net(x / (sigma**2 + 1) ** 0.5, t)[0]
        hand = {
            "epsilon": x - sigma * out,
            "sample": out,
            "v_prediction": -sigma / (sigma**2 + 1) ** 0.5 * out + x / (sigma**2 + 1),
        }[prediction]
        scheduler.scale_model_input(x, t)
        theirs = scheduler.step(out, t, x)
        own = D(x, sigma)
        assert (own - hand).norm() / hand.norm() < 1e-12
        assert_contract("gradient", theirs.pred_original_sample.float(), own)
        x = x + (after - sigma) * (x - own) / sigma
        assert_contract("gradient", theirs.prev_sample.float(), x)


def test_flow_trajectories() -> None:
    net = Net()
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(8)
    v = compat.velocity(net, scheduler)
    times = levels(scheduler)
    net.seen.clear()
    found = fewstep.flow_sample(v, points(), times=times, state="float64")
    own = torch.stack([t[0] for t in net.seen[:-1]])  # Heun ends by Euler's step there
    assert (own - scheduler.timesteps).abs().max() < 1e-4
    x = points() * times[0]
    for t, after in itertools.pairwise(times):
        first = net(x, 1000 * t)[0]
        second = net(x + (after - t) * first, 1000 * after)[0]
        x = x + (after - t) / 2 * (first + second)
    assert (found - x).norm() / x.norm() < 1e-12
    assert torch.equal(v(x, 0.25), net(x, torch.tensor(250.0))[0])
    # D of the flow, and the library's Euler step from t to 0, which is it.
    D = compat.denoiser(net, scheduler)
    assert (D(x / 0.4, 1.5) - (x - 0.6 * v(x, 0.6))).abs().max() < 1e-12


def test_inverted_flow() -> None:
    """Mochi's sigmas rise from noise to data."""
    net = Net()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(6)
    v = compat.velocity(net, scheduler)
    x = points()
    expected = x.float()
    for t in scheduler.timesteps:
        expected = scheduler.step(net(expected.double(), t)[0].float(), t, expected).prev_sample
    times = 1 - scheduler.sigmas.double()
    for t, after in itertools.pairwise(times):
        x = x + (after - t) * v(x, t)
    assert_contract("gradient", expected, x)


def test_flow_prediction() -> None:
    """The multistep solvers' flows are those of the flow schedulers."""
    net = Net()
    options = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    for kind in (diffusers.DPMSolverMultistepScheduler, diffusers.UniPCMultistepScheduler):
        scheduler = kind(**options)
        scheduler.set_timesteps(6)
        t, sigma = scheduler.timesteps[2], scheduler.sigmas[2].double()
        scheduler._step_index = 2
        out = net(points(), t)[0]
        D = compat.denoiser(net, scheduler)(points() / (1 - sigma), sigma / (1 - sigma))
        theirs = scheduler.convert_model_output(out, sample=points())
        assert (D - theirs).norm() / theirs.norm() < 1e-3  # their timesteps are whole
        scheduler = kind(prediction_type="epsilon", use_flow_sigmas=True)
        D = compat.denoiser(net, scheduler)(points() / (1 - sigma), sigma / (1 - sigma))
        out = net(points(), 1000 * sigma)[0]
        assert (D - (points() - sigma * out) / (1 - sigma)).abs().max() < 1e-10


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    "name",
    ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"],
)
def test_edm(name: str, prediction: str) -> None:
    if name.startswith("Cosine"):
        pytest.importorskip("torchsde")
    net = Net()
    scheduler = getattr(diffusers, name)(prediction_type=prediction)
    D, v = compat.denoiser(net, scheduler), compat.velocity(net, scheduler)
    assert (D.sigma_min, D.sigma_max) == (scheduler.config.sigma_min, scheduler.config.sigma_max)
    for sigma in torch.tensor([0.002, 0.5, 3.0, 80.0], dtype=F64):
        out = net(
            scheduler.precondition_inputs(points(), sigma), scheduler.precondition_noise(sigma)
        )
        expected = scheduler.precondition_outputs(points(), out[0], sigma)
        assert (D(points(), sigma) - expected).norm() / expected.norm() < 1e-12
    assert v(points(), v.t_max).isfinite().all()


def test_continuous_timesteps() -> None:
    net = Net()
    scheduler = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_max=700.0, sigma_min=0.002
    )
    D = compat.denoiser(net, scheduler)
    assert (D.sigma_min, D.sigma_max) == (0.002, 700.0)
    sigma = torch.tensor(0.3, dtype=F64)
    out = net(points() / (sigma**2 + 1) ** 0.5, 0.25 * sigma.log())[0]
    expected = -sigma / (sigma**2 + 1) ** 0.5 * out + points() / (sigma**2 + 1)
    assert (D(points(), sigma) - expected).abs().max() < 1e-12


SCHEDULERS: dict[str, Callable[[], Any]] = {
    **{
        name: lambda name=name: diffusers.DDPMScheduler(prediction_type=name, clip_sample=False)
        for name in PREDICTIONS
    },
    "clipped": lambda: diffusers.DDPMScheduler(clip_sample_range=0.7),
    "flow": diffusers.FlowMatchEulerDiscreteScheduler,
    "edm": diffusers.EDMEulerScheduler,
    "zero": lambda: diffusers.DDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, clip_sample=False
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_velocity_is_that_of_its_denoiser(name: str) -> None:
    net, scheduler = Net(), SCHEDULERS[name]()
    D, v = compat.denoiser(net, scheduler), compat.velocity(net, scheduler)
    times = torch.tensor([0.02, 0.3, 0.5, 0.9, 0.99], dtype=F64)
    x = points()
    own = D(x / (1 - times)[:, None], times / (1 - times))
    assert (v(x, times) - (x - own) / times[:, None]).abs().max() < 1e-9
    if name == "clipped":
        assert own.abs().max() == 0.7


def test_zero_terminal_snr() -> None:
    """At t = 1 there is noise alone: v is `-x_data`, and the timestep is the last one."""
    net, x = Net(), points()
    options: dict[str, Any] = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    for scheduler in (
        diffusers.DDIMScheduler(**options, clip_sample=False),
        diffusers.EulerDiscreteScheduler(**options),
    ):
        v = compat.velocity(net, scheduler)
        out = net(x, torch.tensor(999.0))[0]
        assert v.t_max == 1
        assert (v(x, 1.0) - (x + out)).abs().max() < 1e-12
    scheduler = diffusers.DDIMScheduler(**options, clip_sample=False)
    scheduler.set_timesteps(1000)
    theirs = scheduler.step(out, 999, x).pred_original_sample
    assert (x - compat.velocity(net, scheduler)(x, 1.0) - theirs).abs().max() < 1e-12
    v = compat.velocity(net, scheduler)
    assert fewstep.flow_sample(v, x, times=torch.linspace(1, v.t_min, 5)).isfinite().all()
    D = compat.denoiser(net, scheduler)
    assert D(x, D.sigma_max).isfinite().all()
    with pytest.raises(ValueError, match="sigma must be within"):
        D(x, 2 * D.sigma_max)
    with pytest.raises(ValueError, match=r"t must be within .*, or 1, .* got 0.9999"):
        v(x, 0.99999999)
    noise = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, clip_sample=False)
    v = compat.velocity(net, noise)
    assert v.t_max < 1
    with pytest.raises(ValueError, match=r"t must be within .* got 1: give the sampler .* t_max"):
        v(x, 1.0)


def test_ends_that_were_rounded_to_float32() -> None:
    net, x = Net(), points()
    D, v = (make(net, diffusers.DDIMScheduler()) for make in (compat.denoiser, compat.velocity))
    for level in (D.sigma_min, D.sigma_max):
        for share in (1 - 6e-8, 1 + 6e-8):
            near = torch.tensor(level * share, dtype=torch.float64)
            torch.testing.assert_close(D(x, near), D(x, level))
            t = near / (1 + near)
            torch.testing.assert_close(v(x, t), v(x, level / (1 + level)))
    with pytest.raises(ValueError, match="must be within"):
        D(x, torch.tensor(1.00001 * D.sigma_max, dtype=torch.float64))
    flow = compat.denoiser(net, diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match=r"within 0 and below inf, .* got inf"):
        flow(x, math.inf)


def test_a_level_that_stands_for_pure_noise() -> None:
    """Euler's first level with zero terminal SNR, 4096, is below the one before it in its table."""
    scheduler = diffusers.EulerDiscreteScheduler(
        rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
    )
    scheduler.set_timesteps(5)
    net = Net()
    D, x = compat.denoiser(net, scheduler), 4000 * points()
    assert float(scheduler.sigmas[0]) == D.sigma_max
    for t, sigma in zip(scheduler.timesteps, scheduler.sigmas.double(), strict=False):
        out = net(x / (sigma**2 + 1) ** 0.5, t)[0]
        hand = -sigma / (sigma**2 + 1) ** 0.5 * out + x / (sigma**2 + 1)
        own = D(x, sigma)
        assert (own - hand).norm() / hand.norm() < 1e-9


@pytest.mark.parametrize("name", sorted(compat._DISCRETE - {"DDPMScheduler"}))
def test_all_schedulers_with_a_table(name: str) -> None:
    """Networks of the same schedule are the same denoisers."""
    options: dict[str, Any] = {"beta_start": 0.001, "beta_end": 0.01, "beta_schedule": "linear"}
    own: dict[str, Any] = {"prediction_type": "v_prediction"}
    if name.startswith("CogVideoX"):
        own |= {"snr_shift_scale": 1.0, "rescale_betas_zero_snr": False}
    try:
        scheduler = getattr(diffusers, name)(**options, **own)
    except ImportError as error:
        pytest.skip(str(error).strip().splitlines()[0])
    ddpm = diffusers.DDPMScheduler(**options, prediction_type="v_prediction", clip_sample=False)
    scheduler.register_to_config(clip_sample=False)
    expected = compat.denoiser(Net(), ddpm)(points(), 1.7)
    assert (compat.denoiser(Net(), scheduler)(points(), 1.7) - expected).abs().max() < 1e-5


def test_levels_out_of_range() -> None:
    D = compat.denoiser(Net(torch.float32), diffusers.DDPMScheduler(clip_sample=False))
    x = points(dtype=torch.float32)
    with pytest.raises(
        ValueError, match=r"sigma must be within 0.01\d* and 157.*got 0.00.*: .*sigma_min"
    ):
        fewstep.edm_sample(D, x, sigma_max=D.sigma_max)
    inside = {"sigma_min": D.sigma_min, "sigma_max": D.sigma_max}
    fewstep.edm_sample(D, x, steps=4, **inside)
    fewstep.edm_sample(D, x.bfloat16(), steps=4, **inside)
    v = compat.velocity(Net(torch.float32), diffusers.DDPMScheduler(clip_sample=False))
    fewstep.flow_sample(v, x, times=torch.linspace(v.t_max, v.t_min, 5, dtype=F64))
    for bad in (math.nan, -1.0, math.inf):
        with pytest.raises(ValueError, match="sigma must be within"):
            D(x, bad)
    with torch.device("meta"):
        assert D._inside(torch.ones(2, dtype=F64), 1e-9).is_meta  # nothing is looked at


def test_options_of_another_scheduler() -> None:
    """A config keeps those that its class has not."""
    ddpm = diffusers.DDPMScheduler(clip_sample_range=0.1)
    euler = diffusers.EulerDiscreteScheduler.from_config(ddpm.config)
    euler.register_to_config(clip_sample=True, clip_sample_range=0.1)
    assert compat.denoiser(Net(), euler)(points(), 1.0).abs().max() > 0.1
    assert compat.denoiser(Net(), ddpm)(points(), 1.0).abs().max() == 0.1


def test_guidance() -> None:
    net, scheduler = Net(), SCHEDULERS["epsilon"]()
    shift = torch.linspace(-1, 1, 5, dtype=F64)[:, None]
    weight = torch.linspace(1, 3, 5, dtype=F64)
    D = compat.denoiser(net, scheduler, guidance=weight, uncond={"shift": 0.5}, shift=shift)
    one = compat.denoiser(net, scheduler, shift=shift)(points(), 2.0)
    none = compat.denoiser(net, scheduler, shift=0.5)(points(), 2.0)
    expected = none + weight[:, None] * (one - none)
    assert (D(points(), 2.0) - expected).abs().max() < 1e-12
    assert len(D.state_dict()) == 5  # the shift goes where the module goes


CONDITIONED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "unet": (
        "conditioned",
        {"encoder_hidden_states": torch.linspace(-1, 1, 24).view(2, 3, 4)},
        {"encoder_hidden_states": torch.zeros(2, 3, 4)},
    ),
    "dit": ("dit", {"class_labels": torch.tensor([1, 2])}, {"class_labels": 10}),
}


@pytest.mark.parametrize("name", CONDITIONED)
def test_conditioned_networks(name: str) -> None:
    """A pipeline's call, both conditions in one batch."""
    make, inputs, uncond = CONDITIONED[name]
    with rows.quiet():
        net = getattr(networks, make)(diffusers).model.eval()
    scheduler = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    scheduler.set_timesteps(4)
    x, t, sigma = torch.randn(2, 1, 4, 4), scheduler.timesteps[2], scheduler.sigmas[2]
    t = t.round()
    sigma = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod)[int(t)].sqrt()
    ((key, own),) = inputs.items()
    none = torch.full_like(own, uncond[key]) if isinstance(uncond[key], int) else uncond[key]
    scaled = torch.cat((x, x)) / (sigma**2 + 1) ** 0.5
    out = net(scaled, timestep=t.expand(4), **{key: torch.cat((none, own))}).sample
    out = out[:2] + 3.0 * (out[2:] - out[:2])
    expected = -sigma / (sigma**2 + 1) ** 0.5 * out + x / (sigma**2 + 1)
    D = compat.denoiser(net, scheduler, guidance=3.0, uncond=uncond, **inputs)
    torch.testing.assert_close(D(x, sigma), expected, rtol=1e-4, atol=1e-5)


class Classes(nn.Module):
    """Predicts twice the channels, the second half of which are variances."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(4, 1)

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor, more: Any = None) -> Any:
        own = self.table(class_labels)[..., None, None] * x
        own = own if more is None else own + more["a"][0]
        return torch.cat((own, torch.full_like(x, math.inf)), 1)


def test_class_labels_and_variances() -> None:
    net, x = Classes(), torch.randn(3, 2, 4, 4)
    scheduler = diffusers.DDPMScheduler(
        prediction_type="sample", variance_type="learned_range", clip_sample=False
    )
    more = {"a": [torch.ones(())]}
    D = compat.denoiser(net, scheduler, class_labels=2, more=more)
    weight = net.table.weight[:, 0]
    torch.testing.assert_close(D(x, 1.0), weight[2] * x / 2**0.5 + 1)
    labels = torch.tensor([0, 1, 3])
    torch.testing.assert_close(
        D(x, torch.ones(3), labels), weight[labels][:, None, None, None] * x / 2**0.5 + 1
    )
    D = copy.deepcopy(D).double()
    assert D(x.double(), 1.0).dtype == F64
    D = compat.denoiser(net, scheduler, class_labels=0, guidance=2.0, uncond={"class_labels": 3})
    scale = (weight[3] + 2 * (weight[labels] - weight[3]))[:, None, None, None]
    torch.testing.assert_close(D(x, torch.ones(3), labels), scale * x / 2**0.5)


def test_a_network_in_half_precision() -> None:
    scheduler = SCHEDULERS["v_prediction"]()
    exact = compat.denoiser(Net(), scheduler)(points(), 0.5)
    low = compat.denoiser(Net(torch.bfloat16), scheduler)(points(dtype=torch.float32), 0.5)
    assert low.dtype == torch.float32
    assert (low - exact).norm() / exact.norm() < 0.02


def test_teacher(tmp_path: Path) -> None:
    with rows.quiet():
        net = networks.unet2d(diffusers).model.eval()  # type: ignore[attr-defined]
    scheduler = SCHEDULERS["v_prediction"]()
    teacher = compat.teacher(net, scheduler, (1, 4, 4))
    D = teacher.denoiser
    assert isinstance(D, compat.Prediction)
    config = PairsConfig(
        n=4, steps=3, batch=4, shard_size=4, sigma_min=D.sigma_min, sigma_max=D.sigma_max
    )
    assert generate(teacher, config, tmp_path, progress=False, device="cpu") == 0
    x0, x1 = PairDataset(tmp_path)[2]
    own = fewstep.edm_sample(D, x0[None], steps=3, sigma_min=D.sigma_min, sigma_max=D.sigma_max)
    torch.testing.assert_close(own[0], x1)
    student = nn.Conv2d(1, 1, 3, padding=1)
    loss, _ = LinesMatching()(lambda x, sigma: student(x), x0[None], x1[None])
    loss.backward()
    others = [
        compat.teacher(net, SCHEDULERS["epsilon"](), (1, 4, 4)),
        compat.teacher(net, diffusers.DDPMScheduler(beta_end=0.01), (1, 4, 4)),
        compat.teacher(net, scheduler, (1, 4, 4), timestep=lambda t: t / 2),
        compat.teacher(net, scheduler, (1, 4, 4), guidance=2.0, uncond={"class_labels": None}),
    ]
    assert len({one.digest for one in (teacher, *others)}) == 5
    assert compat.teacher(net, SCHEDULERS["v_prediction"](), (1, 4, 4)).digest == teacher.digest


def test_a_teacher_with_a_name() -> None:
    """The name stands for the weights, not for what else the pairs depend on."""

    def network(x: Tensor, timestep: Tensor, shift: Tensor) -> Tensor:
        return x + shift

    found = [
        compat.teacher(network, SCHEDULERS[name](), (4,), digest="mine", shift=torch.ones(4) * k)
        for name, k in (("epsilon", 1), ("epsilon", 2), ("flow", 1), ("epsilon", 1))
    ]
    names = [teacher.digest for teacher in found]
    assert all(name.startswith("mine, ") for name in names)
    assert names[3] == names[0]
    assert len(set(names)) == 3


def test_a_teacher_of_marginal_reflow() -> None:
    v = compat.velocity(Net(), SCHEDULERS["v_prediction"]())
    student = nn.Linear(4, 4, dtype=F64)
    loss, _ = MarginalReflow(windows=2, t_min=0.05)(
        lambda x, t: student(x), lambda x, t: v(x, t.clamp_max(v.t_max)), points(8)
    )
    loss.backward()
    assert student.weight.grad is not None


@pytest.mark.parametrize("name", ["epsilon", "flow", "edm"])
def test_traces(name: str) -> None:
    """A velocity is a network as others are, which the duals run."""
    v = compat.velocity(Net(), SCHEDULERS[name]())
    t = torch.tensor([0.1, 0.5, 0.9, 0.95, 0.3], dtype=F64)
    out = fewstep.divergence(v, points(), t, estimator="exact")
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, s: v(x[None], s[None])[0]))(points(), t)
    assert out.info == ""
    assert (out.value - jacobian.diagonal(dim1=1, dim2=2).sum(1)).abs().max() < 1e-9


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "flow", "edm"])
def test_derivatives_in_time(name: str) -> None:
    v, x = compat.velocity(Net(), SCHEDULERS[name]()), points()
    t, h = torch.full((5,), 0.4, dtype=F64), 1e-5
    out = fewstep.jvp(v, (x, t), (x, 1.0))
    difference = (v((1 + h) * x, t + h) - v((1 - h) * x, t - h)) / (2 * h)
    assert (out.engine, out.info) == ("duals", "")
    assert (out.tangent - difference).norm() / difference.norm() < 1e-7


HEUN = ["epsilon", "sample", "v_prediction"]


@pytest.mark.parametrize("prediction", HEUN)
def test_heun_scheduler(prediction: str, tmp_path: Path) -> None:
    """diffusers' numbers, and those of `edm_sample`, after a trip through a file."""
    theirs = diffusers.HeunDiscreteScheduler(
        **BETAS, prediction_type=prediction, use_karras_sigmas=True
    )
    compat.HeunScheduler.from_config(theirs.config).save_pretrained(tmp_path)
    ours = compat.HeunScheduler.from_pretrained(tmp_path)
    assert isinstance(ours, diffusers.HeunDiscreteScheduler)
    assert {**ours.config}.items() >= {
        k: v for k, v in theirs.config.items() if k[0] != "_"
    }.items()
    ours.set_timesteps(6)
    theirs.set_timesteps(6)
    net, x = Net(), points()
    found, expected = heun(ours, net, x), heun(theirs, net, x)
    assert (found - expected).norm() / expected.norm() < 1e-12
    D = compat.denoiser(net, ours)
    direct = fewstep.edm_sample(D, x, sigmas=levels(ours), state="float64")
    assert (found - direct).norm() / direct.norm() < 1e-6
    ours.set_timesteps(6)
    assert_contract("gradient", heun(ours, Net(torch.float32), x.float()), found)
    with torch.inference_mode():
        ours.set_timesteps(6)
        assert (heun(ours, net, x) - expected).norm() / expected.norm() < 1e-12


class Pipeline(diffusers.DiffusionPipeline):  # type: ignore[misc]
    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)


def test_a_pipeline_keeps_its_scheduler(tmp_path: Path) -> None:
    Pipeline(compat.HeunScheduler(use_karras_sigmas=True)).save_pretrained(tmp_path)
    loaded = Pipeline.from_pretrained(tmp_path).scheduler
    assert type(loaded) is compat.HeunScheduler
    assert loaded.config.use_karras_sigmas


def test_flow_heun_scheduler(tmp_path: Path) -> None:
    compat.FlowHeunScheduler(shift=2.0).save_pretrained(tmp_path)
    ours = compat.FlowHeunScheduler.from_pretrained(tmp_path)
    ours.set_timesteps(6)
    net, x = Net(), points()
    own = x
    for t in ours.timesteps:
        own = ours.step(net(own, t)[0], t, own).prev_sample
    times = levels(ours)
    direct = fewstep.flow_sample(compat.velocity(net, ours), x, times=times[:-1], state="float64")
    direct = direct - times[-2] * net(direct, 1000 * times[-2])[0]
    assert (own - direct).norm() / direct.norm() < 1e-6  # its timesteps are float32
    with pytest.raises(NotImplementedError, match=r"s_churn=0.5 .*fewstep.flow_sample"):
        ours.step(own, ours.timesteps[0], own, s_churn=0.5)
    with pytest.raises(ValueError, match=r"one of scheduler\.timesteps, got 3"):
        ours.step(own, 3, own)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_sample_that_a_callback_changes(in_place: bool) -> None:
    options: dict[str, Any] = {**BETAS, "prediction_type": "v_prediction"}
    found = []
    for kind in (compat.HeunScheduler, diffusers.HeunDiscreteScheduler):
        scheduler, net, x = kind(**options), Net(), points()
        scheduler.set_timesteps(4)
        scheduler.sigmas = scheduler.sigmas.double()
        x = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            out = net(scheduler.scale_model_input(x, t), t)[0]
            step = scheduler.step(out, t, x)
            x = step.prev_sample
            x = x.mul_(1.1) if in_place else x * 1.1
        found.append((x, step.pred_original_sample))
    for own, expected in zip(*found, strict=True):
        assert (own - expected).norm() / expected.norm() < 1e-12


def test_gradients_and_clipping_of_the_scheduler() -> None:
    for options in ({}, {"clip_sample": True, "clip_sample_range": 3.0}):
        found = []
        for kind in (compat.HeunScheduler, diffusers.HeunDiscreteScheduler):
            scheduler, net, x = kind(**BETAS, **options), Net(), points().requires_grad_()
            scheduler.set_timesteps(3)
            out = heun(scheduler, net, x)
            found.append((out, *torch.autograd.grad(out.square().sum(), [x, net.a.weight])))
        for own, expected in zip(*found, strict=True):
            assert (own - expected).norm() / expected.norm() < 1e-10


def test_models_whose_pipelines_change_timesteps() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    sana = diffusers.SanaTransformer2DModel.__new__(diffusers.SanaTransformer2DModel)
    with pytest.raises(ValueError, match="timestep must be given for SanaTransformer2DModel"):
        compat.velocity(sana, scheduler)
    flux = diffusers.FluxTransformer2DModel.__new__(diffusers.FluxTransformer2DModel)
    nn.Module.__init__(flux)
    half = torch.tensor(500.0)
    for model in (
        flux,
        flux.forward,
        functools.partial(flux, a=1),
        torch.compile(flux, backend="eager"),
    ):
        assert compat.velocity(model, scheduler).timestep(half) == 0.5
    unet = networks.unet2d(diffusers).model
    for model in (unet, nn.DataParallel(unet), Net(), lambda x, timestep: x):
        assert compat.velocity(model, scheduler).timestep(half) == 500  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"scheduler": "ScoreSdeVeScheduler"}, NotImplementedError, "ScoreSdeVeScheduler is not"),
        (
            {"thresholding": True},
            NotImplementedError,
            "thresholding=True of DDPMScheduler.*from_conf",
        ),
        ({"prediction_type": "noise"}, ValueError, "prediction_type must be one of .* got 'noise'"),
        (
            {"prediction_type": "flow_prediction"},
            NotImplementedError,
            "prediction_type='flow_prediction' of DDPMScheduler with use_flow_sigmas=False",
        ),
        ({"trained_betas": [0.5]}, ValueError, "alphas_cumprod of DDPMScheduler must decrease"),
        ({"guidance": 2.0}, ValueError, "uncond must be given too, got guidance=2.0"),
        ({"uncond": {"shift": 0.0}}, ValueError, "guidance must be given too"),
        ({"guidance": math.nan, "uncond": {"shift": 0.0}}, ValueError, "guidance must be finite"),
        ({"guidance": 1.0, "uncond": {}}, ValueError, "uncond must be inputs by their names"),
        ({"model": 3}, TypeError, "model must be callable, got 3"),
        ({"timestep": 3}, TypeError, "timestep must be callable, got 3"),
    ],
)
def test_bad_arguments(change: dict[str, Any], kind: type[Exception], message: str) -> None:
    arguments = {"model": Net(), "scheduler": "DDPMScheduler", **change}
    own = {k: arguments.pop(k) for k in list(arguments) if k in OPTIONS}
    scheduler = getattr(diffusers, arguments.pop("scheduler"))(**own)
    for make in (compat.denoiser, compat.velocity):
        with pytest.raises(kind, match=message):
            make(
                arguments["model"],
                scheduler,
                **{k: v for k, v in arguments.items() if k != "model"},
            )


OPTIONS = ("thresholding", "prediction_type", "trained_betas")


def test_outputs_and_teachers_that_do_not_fit() -> None:
    D = compat.denoiser(lambda x, timestep: x[:, :1], SCHEDULERS["epsilon"]())
    with pytest.raises(ValueError, match=r"model must return \(5, 4\).* got \(5, 1\)"):
        D(points(), 1.0)
    with pytest.raises(ValueError, match="digest must be given"):
        compat.teacher(lambda x, timestep: x, SCHEDULERS["epsilon"](), (4,))
    with pytest.raises(ValueError, match="uncond must have class_labels"):
        compat.teacher(
            Net(), SCHEDULERS["epsilon"](), (4,), classes=3, guidance=2.0, uncond={"shift": 0}
        )
    with pytest.raises(AttributeError, match="no attribute 'EulerScheduler'"):
        compat.EulerScheduler  # noqa: B018


# diffusers' own tests of schedulers: their model, their ramp of a sample, the sums they expect.
RAMP = (torch.arange(768).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2)
TABLE = {"num_train_timesteps": 1100, "beta_start": 0.0001, "beta_end": 0.02}


def saturating(x: Tensor, t: Any, *_: Any) -> Tensor:
    t = torch.as_tensor(t).reshape(-1, *(1,) * (x.ndim - 1)).to(x.dtype)
    return x * t / (t + 1)


def their_loop(scheduler: Any, x: Tensor, timesteps: Tensor) -> Tensor:
    """The scaled input takes the place of the sample there."""
    for t in timesteps:
        x = scheduler.scale_model_input(x, t)
        x = scheduler.step(saturating(x, t), t, x).prev_sample
    return x


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 0.1233),
        ({"prediction_type": "v_prediction"}, 4.6934e-07),
        ({"use_karras_sigmas": True}, 0.00015),
    ],
)
def test_full_loops_of_heun(options: dict[str, Any], total: float) -> None:
    scheduler = compat.HeunScheduler(**TABLE, **options)
    scheduler.set_timesteps(10)
    x = their_loop(scheduler, RAMP * scheduler.init_noise_sigma, scheduler.timesteps)
    assert abs(float(x.abs().sum()) - total) < 1e-2


def test_a_full_loop_of_heun_from_the_middle() -> None:
    scheduler = compat.HeunScheduler(**TABLE)
    scheduler.set_timesteps(10)
    timesteps = scheduler.timesteps[8 * scheduler.order :]
    x = scheduler.add_noise(RAMP * scheduler.init_noise_sigma, RAMP.flip(3), timesteps[:1])
    x = their_loop(scheduler, x, timesteps)
    assert abs(float(x.abs().sum()) - 75074.8906) < 1e-2


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", ["linspace", "leading"])
def test_custom_timesteps_of_heun(prediction: str, spacing: str) -> None:
    found = []
    for custom in (False, True):
        scheduler = compat.HeunScheduler(
            **TABLE, prediction_type=prediction, timestep_spacing=spacing
        )
        scheduler.set_timesteps(10)
        if custom:
            own = scheduler.timesteps
            scheduler.set_timesteps(timesteps=torch.cat((own[:1], own[1::2])))
        found.append(their_loop(scheduler, RAMP * scheduler.init_noise_sigma, scheduler.timesteps))
    assert float((found[0] - found[1]).abs().sum()) < 1e-5


@pytest.mark.parametrize(
    "options",
    [
        *({"num_train_timesteps": n} for n in (10, 50, 100, 1000)),
        *({"beta_start": b, "beta_end": 20 * b} for b in (0.00001, 0.0001, 0.001)),
        *({"beta_schedule": name} for name in ("linear", "scaled_linear", "exp")),
        *({"clip_sample": True, "clip_sample_range": r} for r in (1.0, 2.0, 3.0)),
        *({"prediction_type": name} for name in PREDICTIONS),
        {"use_beta_sigmas": True},
        {"use_exponential_sigmas": True},
    ],
    ids=str,
)
def test_configurations_of_heun(options: dict[str, Any], tmp_path: Path) -> None:
    """A step is the same after a trip through a file, and it is diffusers'."""
    if "use_beta_sigmas" in options:
        pytest.importorskip("scipy")
    ours = compat.HeunScheduler(**{**TABLE, **options})
    ours.save_config(tmp_path)
    others = compat.HeunScheduler.from_pretrained(tmp_path), diffusers.HeunDiscreteScheduler
    x = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    found = []
    for scheduler in (ours, others[0], others[1](**{**TABLE, **options})):
        scheduler.set_timesteps(10)
        out = scheduler.step(0.1 * x, scheduler.timesteps[0], x)
        pair = scheduler.step(0.1 * out.prev_sample, scheduler.timesteps[1], out.prev_sample)
        found.append(pair.prev_sample)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({}, 10.0807),
        ({"prediction_type": "v_prediction"}, 0.0002),
        ({"use_karras_sigmas": True}, 124.523),
    ],
)
def test_full_loops_of_euler(options: dict[str, Any], total: float) -> None:
    """By `edm_sample`, with a callback that scales the sample as their loop does."""
    scheduler = diffusers.EulerDiscreteScheduler(**TABLE, **options)
    scheduler.set_timesteps(10)
    sigmas, timesteps = scheduler.sigmas.double(), iter(scheduler.timesteps.repeat_interleave(2))

    def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
        out, s = saturating(x, next(timesteps)), sigma[:, None, None, None]
        if "prediction_type" in options:
            return x / (s**2 + 1) - s / (s**2 + 1).sqrt() * out
        return x - s * out

    def scaled(step: fewstep.samplers.SamplerStep) -> Tensor:
        return step.x / (step.level[:, None, None, None] ** 2 + 1).sqrt()

    start = RAMP * (scheduler.init_noise_sigma / sigmas[0]).float()
    x = fewstep.edm_sample(denoiser, start, sigmas=sigmas, solver="euler", callback=scaled)
    assert abs(float(x.abs().sum()) - total) < 1e-2


@pytest.mark.parametrize(
    ("options", "mean"),
    [
        ({}, 0.3301),
        ({"prediction_type": "v_prediction"}, 0.2251),
        ({"prediction_type": "v_prediction", "use_karras_sigmas": True}, 0.2096),
        ({"prediction_type": "v_prediction", "use_lu_lambdas": True}, 0.1554),
        ({"begin": 5}, 0.4146),
    ],
)
def test_full_loops_of_dpm_solver(options: dict[str, Any], mean: float) -> None:
    """By `edm_sample`, whose x is `sqrt(1 + sigma^2)` times theirs, to the table's lowest level."""
    options = dict(options)
    begin = options.pop("begin", 0)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **{**TABLE, "num_train_timesteps": 1000, "final_sigmas_type": "sigma_min"},
        lower_order_final=False,
        **options,
    )
    scheduler.set_timesteps(10)
    # Karras's levels end with a step of no length.
    x, sigmas = RAMP, scheduler.sigmas.double()[begin:].unique_consecutive()
    if begin:
        x = scheduler.add_noise(x, RAMP.flip(3), scheduler.timesteps[begin : begin + 1])
    D = compat.denoiser(lambda x, timestep: (saturating(x, timestep),), scheduler)
    start = x * (1 + sigmas[0] ** 2).sqrt().float() / sigmas[0].float()
    x = fewstep.edm_sample(D, start, sigmas=sigmas, solver="dpm++2m")
    x = x / (1 + sigmas[-1] ** 2).sqrt().float()
    assert abs(float(x.abs().mean()) - mean) < 1e-3
