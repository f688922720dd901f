"""Training few-step students of a flow: a teacher, and a student with alignment and without."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fewstep import checkpoint, plots
from fewstep.data import Images, load
from fewstep.methods import MarginalReflow
from fewstep.methods.reflow import ReflowReport, heun, log_prob_of, score_of
from fewstep.metrics import MetricRow, report
from fewstep.networks import VelocityMLP
from fewstep.train import (
    CHECKPOINT,
    CONFIG,
    LOGS,
    PICTURE,
    allocate,
    deferred_signals,
    require_extra,
    seeded,
    start_run,
    torch_device,
)

STAGES = ("teacher", "student", "plain")
_WARM_UP = 50  # steps
_EVALUATED = 256  # images, for densities
Field = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ReflowConfig:
    """What decides a run, all of it.

    Attributes:
        data: "digits", "mnist5k", a .npy file, or a folder of images.
        teacher: folder of an earlier run, whose teacher is taken; empty: one is trained.
        teacher_steps: optimizer steps of the teacher, by flow matching.
        student_steps: of each student, with the alignment and without.
        teacher_batch: images per step of the teacher.
        batch: of the students.
        lr: Adam's learning rate after 50 steps of warm-up; a cosine takes it to 0. Students take
            a quarter of it.
        ema: decay of the averaged weights, which make the samples.
        width: of the hidden layers.
        depth: hidden layers; up to two have their exact trace, see `fewstep.divergence`.
        clip: largest norm of a student's gradient.
        seed: of the weights, the noise and the batches.
        log_every: steps between entries in the logs.
        checkpoint_every: steps between checkpoints.
        device: "auto" takes a GPU where there is one.
        flow: the method's own numbers.

    Raises:
        ValueError: a number outside its range.
    """

    data: str
    teacher: str = ""
    teacher_steps: int = 3000
    student_steps: int = 400
    teacher_batch: int = 256
    batch: int = 128
    lr: float = 2e-3
    ema: float = 0.99
    width: int = 384
    depth: int = 2
    clip: float = 5.0
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 250
    device: str = "auto"
    flow: MarginalReflow = field(default_factory=MarginalReflow)

    def __post_init__(self) -> None:
        sizes = ("teacher_steps", "student_steps", "teacher_batch", "batch", "width", "depth")
        lowest = dict.fromkeys((*sizes, "log_every", "checkpoint_every"), 1) | {"seed": 0}
        for name, low in lowest.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        for name in ("lr", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema!r}")


# Determinants of 64 dimensions are cheap; with more of them, traces along four steps a window.
_DIGITS = MarginalReflow(lam=1.0, warmup=150, weight="one", t_min=0.05)
_LARGE = replace(_DIGITS, lam=0.03, weight="t^2", tracker="trace", steps=4)


def preset(data: str) -> ReflowConfig:
    """The defaults for a data set.

    >>> preset("digits").flow.tracker, preset("mnist5k").flow.tracker
    ('logdet', 'trace')
    """
    return ReflowConfig(data, flow=_DIGITS if data == "digits" else _LARGE)


@dataclass(frozen=True)
class Outcome:
    """A student's numbers: distances of its samples, and of its laws from the teacher's."""

    rows: list[MetricRow]
    laws: ReflowReport


@dataclass(frozen=True)
class ReflowResult:
    """What `train` returns.

    Attributes:
        student: with the averaged weights, on the CPU, in evaluation mode.
        outcomes: by the name of the student, "student" and "plain" (lam = 0).
        table: of both, in plain text.
        picture: path of the PNG with real and generated images.
    """

    student: VelocityMLP
    outcomes: dict[str, Outcome]
    table: str
    picture: Path


def train(
    config: ReflowConfig,
    out: Path,
    *,
    teacher: Field | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> ReflowResult:
    """Train a teacher by flow matching and two few-step students of it, then measure and picture.

    The folder `out` gets `config.json`, `checkpoint.safetensors`, TensorBoard `logs` and
    `samples.png`, as of `fewstep.train.train`; a resumed run repeats the uninterrupted one bit for
    bit.

    Args:
        config (ReflowConfig): see there; `preset(data)` has the defaults.
        out (Path): folder of the run, made if need be.
        teacher (Callable | None): a velocity `(x [B, C, H, W], t [B])` from data at 0 to noise at
            1, in place of one that is trained; the students then start from random weights.
        resume (bool): continue from the checkpoint in `out`, with the configuration it began with.
        overwrite (bool): replace a run that is in `out`.
        progress (bool): show a progress bar on stderr.

    Returns:
        ReflowResult: student, numbers, picture.

    Raises:
        ValueError: data that cannot be loaded, `out` in use, a checkpoint that is damaged or of
            another run.
        FloatingPointError: a loss is no longer finite; the last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
        ModuleNotFoundError: a package of the extra `fewstep[train]` is missing.

    >>> import tempfile
    >>> config = replace(preset("digits"), teacher_steps=2, student_steps=2, batch=8, width=8)
    >>> result = train(config, Path(tempfile.mkdtemp()), progress=False)
    >>> sorted(result.outcomes)
    ['plain', 'student']
    """
    require_extra()
    data = load(config.data)
    if len(data.images) < 12:
        raise ValueError(f"data: must have at least 12 images, got {len(data.images)}")
    shape = tuple(data.images.shape[1:])
    _open(config, shape, out, resume=resume, overwrite=overwrite)
    device = torch_device(config.device)
    networks = _networks(config, shape)
    if config.teacher:
        _take_teacher(networks, config, shape)
    _fit(config, data, networks, out, device, teacher, progress=progress)
    averages = {name: network.average.module for name, network in networks.items()}
    done = {name: cast(VelocityMLP, module.cpu().eval()) for name, module in averages.items()}
    field_ = done["teacher"] if teacher is None else teacher
    outcomes, picture = evaluate(config, data, field_, done, out)
    return ReflowResult(done["student"], outcomes, format_outcomes(outcomes), picture)


def read_run(out: Path) -> tuple[ReflowConfig, tuple[int, ...]]:
    """The configuration and image shape of a run.

    Raises:
        ValueError: it is missing, or is not one of this method.
    """
    path = out / CONFIG
    try:
        content = json.loads(path.read_text())
        if content["method"] != "reflow":
            raise ValueError(f"method is {content['method']}")
        flow = MarginalReflow(**content["config"]["flow"])
        config = ReflowConfig(**{**content["config"], "flow": flow})
        return config, tuple(map(int, content["image_shape"]))
    except FileNotFoundError as error:
        raise ValueError(f"{out} holds no run of fewstep: {CONFIG} is missing") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not the configuration of a reflow run: {error}") from error


def load_student(out: Path) -> tuple[VelocityMLP, MarginalReflow]:
    """The student of a run, with the averaged weights of its last checkpoint, and its method.

    Raises:
        ValueError: no run, or a checkpoint that is missing, damaged or of another run.
    """
    config, shape = read_run(out)
    student = _network(config, shape)
    state = {f"student.ema.module.{name}": t for name, t in student.state_dict().items()}
    checkpoint.restore(out / CHECKPOINT, state)
    return student.eval(), config.flow


@torch.no_grad()
def sample(student: VelocityMLP, flow: MarginalReflow, n: int, *, seed: int = 0) -> Tensor:
    """n images `[n, C, H, W]` from seeded noise, cut to [-1, 1]."""
    noise = torch.randn(n, *student.image_shape, generator=seeded(seed, 0))
    return flow.sample(student, noise).clamp(-1, 1)


@torch.no_grad()
def evaluate(
    config: ReflowConfig, data: Images, teacher: Field, networks: dict[str, VelocityMLP], out: Path
) -> tuple[dict[str, Outcome], Path]:
    """Both students' samples against the data, their laws against the teacher's, and a picture."""
    images = data.images
    m, seed = min(2000, len(images)), config.seed
    outcomes = {}
    chosen = torch.randperm(len(images), generator=seeded(seed, 1))[:_EVALUATED]
    for name in STAGES[1:]:
        generated = sample(networks[name], config.flow, m, seed=seed)
        laws = config.flow.evaluate(
            networks[name],
            images[chosen],
            log_prob=log_prob_of(teacher, steps=20),
            score=score_of(teacher),
            generator=seeded(seed, 2),
        )
        rows = report(images, generated, real_labels=data.labels, seed=seed)
        outcomes[name] = Outcome(rows, laws)
    columns, shown = 10, 30
    noise = torch.randn(shown, *images.shape[1:], generator=seeded(seed, 3))
    t = torch.ones(shown)
    of_teacher = heun(teacher, noise, t, 0 * t + config.flow.t_min, 40)
    of_teacher = of_teacher - config.flow.t_min * teacher(of_teacher, 0 * t + config.flow.t_min)
    own = [config.flow.sample(networks[name], noise) for name in STAGES[1:]]
    picture = out / PICTURE
    plots.save_comparison(
        picture,
        images[chosen[torch.arange(3 * shown) % len(chosen)]],
        torch.cat([of_teacher, *own]).clamp(-1, 1),
        columns=columns,
        names=["teacher"] * 3 + ["student"] * 3 + ["lam = 0"] * 3,
        real_names=(),
    )
    return outcomes, picture


def format_outcomes(outcomes: dict[str, Outcome]) -> str:
    """A table of both students, with the real-vs-real floor where there is one."""
    aligned, plain = outcomes["student"], outcomes["plain"]
    lines = [("metric", "with alignment", "without", "real vs real")]
    for a, b in zip(aligned.rows, plain.rows, strict=True):
        lines.append((a.name, f"{a.value:.3g}", f"{b.value:.3g}", f"{a.floor:.3g}"))

    def law(name: str, value: Callable[[ReflowReport], float]) -> None:
        lines.append((name, f"{value(aligned.laws):.3g}", f"{value(plain.laws):.3g}", ""))

    for k in range(len(aligned.laws.local_kl)):
        law(f"KL to teacher, window {k + 1}", functools.partial(_local, k=k))
    law("KL to teacher, sampled", lambda r: r.final_kl)
    law("its standard error", lambda r: r.final_stderr)
    law("bound on TV", lambda r: r.tv_bound)
    law("largest Stein check", lambda r: float(r.stein.abs().max()))
    law("non-positive determinants", lambda r: float(r.nonpositive.mean()))
    widths = [max(len(line[c]) for line in lines) for c in range(4)]
    return "\n".join(
        f"{line[0]:<{widths[0]}}  " + "  ".join(f"{line[c]:>{widths[c]}}" for c in (1, 2, 3))
        for line in lines
    )


def _local(report: ReflowReport, k: int) -> float:
    return float(report.local_kl[k])


@dataclass
class _Network:
    """A network in training."""

    model: VelocityMLP
    average: AveragedModel
    optimizer: torch.optim.Optimizer

    def state(self, name: str, optimizer: bool) -> dict[str, Tensor]:
        """Live tensors by their names in a checkpoint."""
        state = {f"{name}.model.{key}": t for key, t in self.model.state_dict().items()}
        state |= {f"{name}.ema.{key}": t for key, t in self.average.state_dict().items()}
        if optimizer:
            for i, moments in self.optimizer.state_dict()["state"].items():
                state |= {f"{name}.optimizer.{i}.{key}": t for key, t in moments.items()}
        return state


def _network(config: ReflowConfig, shape: tuple[int, ...]) -> VelocityMLP:
    return VelocityMLP(shape, width=config.width, depth=config.depth)


def _networks(config: ReflowConfig, shape: tuple[int, ...]) -> dict[str, _Network]:
    averaging = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
    networks = {}
    for i, name in enumerate(STAGES):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed + min(i, 1))  # both students have the same weights
            model = _network(config, shape).to(torch_device(config.device))
        lr = config.lr if name == "teacher" else config.lr / 4
        optimizer = torch.optim.Adam(model.parameters(), lr=lr, fused=True)
        networks[name] = _Network(model, AveragedModel(model, multi_avg_fn=averaging), optimizer)
    return networks


def _take_teacher(
    networks: dict[str, _Network], config: ReflowConfig, shape: tuple[int, ...]
) -> None:
    folder = Path(config.teacher)
    other, its_shape = read_run(folder)
    for name, a, b in (
        ("image shape", its_shape, shape),
        ("width", other.width, config.width),
        ("depth", other.depth, config.depth),
    ):
        if a != b:
            raise ValueError(f"teacher: {folder} has {name} {a}, not {b}")
    average = networks["teacher"].average
    state = {f"teacher.ema.{key}": t for key, t in average.state_dict().items()}
    checkpoint.restore(folder / CHECKPOINT, state)


def _open(
    config: ReflowConfig, shape: tuple[int, ...], out: Path, *, resume: bool, overwrite: bool
) -> None:
    """Make `out` hold this run and nothing of another; refuse where that is not asked for."""
    path = out / CONFIG
    if resume:
        began, its_shape = read_run(out)
        if (began, its_shape) != (config, shape):
            raise ValueError(f"{out} holds a run of another configuration: {began}")
        return
    if (out / CHECKPOINT).exists() and not overwrite:
        raise ValueError(f"{out} holds a run already: give --resume or --overwrite")
    if path.exists() or (out / CHECKPOINT).exists():
        try:
            json.loads(path.read_text())["fewstep"]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not the configuration of a run: {error}") from error
    start_run(out, "reflow", config, shape)


def _fit(
    config: ReflowConfig,
    data: Images,
    networks: dict[str, _Network],
    out: Path,
    device: torch.device,
    teacher: Field | None,
    *,
    progress: bool,
) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm  # type: ignore[import-untyped]

    own_teacher = teacher is None and not config.teacher
    lengths = (
        config.teacher_steps if own_teacher else 0,
        config.student_steps,
        config.student_steps,
    )
    total = sum(lengths)
    done = 0
    if (out / CHECKPOINT).exists():
        for network in networks.values():
            allocate(network.optimizer)
        state: dict[str, Tensor] = {}
        for name, network in networks.items():
            state |= network.state(name, optimizer=True)
        done = checkpoint.restore(out / CHECKPOINT, state)
    else:
        for network in networks.values():
            _keep_weights(network)
    writer = SummaryWriter(str(out / LOGS), purge_step=done)
    bar = tqdm(
        initial=done,
        total=total,
        desc=config.data,
        unit="step",
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    with deferred_signals() as stopped, bar, writer:
        for step in range(done, total):
            stage = next(i for i in range(3) if step < sum(lengths[: i + 1]))
            at = step - sum(lengths[:stage])
            name, network = STAGES[stage], networks[STAGES[stage]]
            if at == 0 and name != "teacher" and teacher is None:
                _copy(networks["teacher"].average.module, network)
            field_ = networks["teacher"].average.module if teacher is None else teacher
            loss, metrics = _loss(config, data, name, network, field_, at, device)
            cosine = (1 + math.cos(math.pi * at / lengths[stage])) / 2
            lr = config.lr if name == "teacher" else config.lr / 4
            network.optimizer.param_groups[0]["lr"] = lr * cosine * min(1, (at + 1) / _WARM_UP)
            network.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.model.parameters(), config.clip)
            network.optimizer.step()
            network.average.update_parameters(network.model)
            bar.update()

            save = (step + 1) % config.checkpoint_every == 0 or step + 1 == total
            if save or stopped.is_set() or step % config.log_every == 0:
                values = {"loss": loss.item(), **{k: v.item() for k, v in metrics.items()}}
                if not all(map(math.isfinite, values.values())):
                    raise FloatingPointError(f"not finite at step {step}: {values}; lower lr")
                bar.set_postfix(stage=name, loss=f"{values['loss']:.4f}", refresh=False)
                if step % config.log_every == 0:
                    for key, value in values.items():
                        writer.add_scalar(f"{name}/{key}", value, at)
            if save or stopped.is_set():
                writer.flush()
                state = {}
                for key, other in networks.items():
                    if not other.optimizer.state:
                        _keep_weights(other)
                    state |= other.state(key, optimizer=True)
                checkpoint.save(out / CHECKPOINT, state, step=step + 1)
            if stopped.is_set():
                raise KeyboardInterrupt(
                    f"stopped after step {step + 1} of {total}; --resume continues"
                )


def _keep_weights(network: _Network) -> None:
    """Make Adam create its moments, at a learning rate of zero."""
    group = network.optimizer.param_groups[0]
    lr, group["lr"] = group["lr"], 0.0
    allocate(network.optimizer)
    group["lr"] = lr
    for moments in network.optimizer.state.values():
        for t in moments.values():
            t.zero_()


@torch.no_grad()
def _copy(source: nn.Module, network: _Network) -> None:
    """Start a student from the teacher's averaged weights."""
    for target in (network.model, network.average.module):
        for own, t in zip(target.parameters(), source.parameters(), strict=True):
            own.copy_(t)


def _loss(
    config: ReflowConfig,
    data: Images,
    name: str,
    network: _Network,
    teacher: Field,
    step: int,
    device: torch.device,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Of one step; its draws depend on (seed, stage, step) alone, the same for both students."""
    rng = seeded(config.seed, 2 * (step + 1) + (name != "teacher"))
    count = config.teacher_batch if name == "teacher" else config.batch
    chosen = torch.randint(len(data.images), (count,), generator=rng)
    x = data.images[chosen].to(device)
    if name != "teacher":
        flow = config.flow if name == "student" else replace(config.flow, lam=0.0)
        return flow(network.model, teacher, x, generator=rng, step=step)
    t = torch.rand(count, generator=rng).to(device)
    eps = torch.randn(x.shape, generator=rng).to(device)
    target = eps - x
    xt = x + t[:, None, None, None] * target
    return (network.model(xt, t) - target).square().mean(), {}
