"""Training a one-step generator from a configuration, with checkpoints, logs and a report."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fewstep
from fewstep import checkpoint, plots
from fewstep.data import Images, load
from fewstep.methods import WFlow
from fewstep.metrics import MetricRow, report
from fewstep.networks import MLPGenerator

CHECKPOINT, CONFIG, LOGS, PICTURE = "checkpoint.safetensors", "config.json", "logs", "samples.png"
EXTRA = ("matplotlib", "mlxtend", "ot", "PIL", "safetensors", "sklearn", "tensorboard", "tqdm")


@dataclass(frozen=True)
class TrainConfig:
    """What decides a run, all of it.

    Attributes:
        data: "digits", "mnist5k", a .npy file, or a folder of images.
        steps: optimizer steps.
        batch: points of each class per step, in each of the three clouds.
        groups: classes per step, drawn at random where there are more.
        lr: Adam's learning rate after 50 steps of warm-up; a cosine takes it to 0.
        ema: decay of the averaged weights, which make the samples.
        noise_dim: dimension of the noise.
        width: of the hidden layers.
        depth: hidden layers.
        seed: of the weights, the noise and the batches.
        log_every: steps between entries in the logs.
        checkpoint_every: steps between checkpoints.
        device: "auto" takes a GPU where there is one.
        flow: the method's own numbers.

    Raises:
        ValueError: a number outside its range.
    """

    data: str
    steps: int = 1500
    batch: int = 128
    groups: int = 10
    lr: float = 5e-3
    ema: float = 0.995
    noise_dim: int = 8
    width: int = 512
    depth: int = 3
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 250
    device: str = "auto"
    flow: WFlow = field(default_factory=lambda: WFlow(eps=0.02))

    def __post_init__(self) -> None:
        for name, low in {
            **dict.fromkeys(("steps", "batch", "groups", "noise_dim", "width", "depth"), 1),
            **dict.fromkeys(("log_every", "checkpoint_every"), 1),
            "seed": 0,
        }.items():
            value = getattr(self, name)
            if not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer of at least {low}, got {value!r}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr!r}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema!r}")


_WARM_UP = 50  # steps
PRESETS = {
    "digits": TrainConfig("digits", steps=1000, batch=64),
    "mnist5k": TrainConfig("mnist5k"),
}


@dataclass(frozen=True)
class Run:
    """A folder's `config.json`: the configuration and what the generator's shape needs."""

    config: TrainConfig
    image_shape: tuple[int, ...]
    names: tuple[str, ...]


@dataclass(frozen=True)
class TrainResult:
    """What `train` returns.

    Attributes:
        generator: with the averaged weights, on the CPU, in evaluation mode.
        rows: the metrics of `fewstep.metrics.report`.
        picture: path of the PNG with real and generated images side by side.
    """

    generator: MLPGenerator
    rows: list[MetricRow]
    picture: Path


def preset(data: str) -> TrainConfig:
    """The defaults for a data set: those of `PRESETS`, or of "mnist5k" for the user's own.

    >>> preset("digits").batch
    64
    """
    return PRESETS.get(data) or replace(PRESETS["mnist5k"], data=data)


def train(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> TrainResult:
    """Train a class-conditional one-step generator with `WFlow`, then measure and picture it.

    The folder `out` gets `config.json`, `checkpoint.safetensors` (every `checkpoint_every` steps,
    at the end, and on Ctrl-C or SIGTERM), TensorBoard `logs` and `samples.png`. Each step's batch
    and noise depend on (seed, step) alone, so a resumed run repeats the uninterrupted one bit for
    bit on the same machine and thread count.

    Args:
        config (TrainConfig): see there; `preset(data)` has the defaults.
        out (Path): folder of the run, made if need be.
        resume (bool): continue from the checkpoint in `out`, with the configuration it began with.
        overwrite (bool): replace a run that is in `out`.
        progress (bool): show a progress bar on stderr.

    Returns:
        TrainResult: generator, metrics, picture.

    Raises:
        ValueError: data that cannot be loaded, `out` in use, a checkpoint that is damaged or of
            another run.
        FloatingPointError: the drift is no longer finite; the last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM, after a checkpoint was written.
        ModuleNotFoundError: a package of the extra `fewstep[train]` is missing.

    >>> import tempfile
    >>> config = replace(preset("digits"), steps=2, batch=8, width=16)
    >>> result = train(config, Path(tempfile.mkdtemp()), progress=False)
    >>> result.picture.name
    'samples.png'
    """
    require_extra()
    data = load(config.data)
    if len(data.images) < 12:
        raise ValueError(f"data: must have at least 12 images, got {len(data.images)}")
    device = torch_device(config.device)
    run = Run(config, tuple(data.images.shape[1:]), data.names)
    _open(run, out, resume=resume, overwrite=overwrite)
    generator = _fit(run, data, out, device, progress=progress)
    rows, picture = evaluate(generator, data, out, seed=config.seed)
    return TrainResult(generator, rows, picture)


def evaluate(
    generator: MLPGenerator, data: Images, out: Path, *, seed: int = 0
) -> tuple[list[MetricRow], Path]:
    """Metrics of up to 2000 samples against the data, and `samples.png`, one row per class.

    Classes are asked for in the proportions of the data.
    """
    n = len(data.images)
    m = min(2000, n)
    labels = None
    columns, rows = 10, 10
    real, names = data.images[: columns * rows], data.names[:20]
    shown: Tensor | None = None
    if data.labels is not None:
        labels = data.labels.sort().values[torch.arange(m) * n // m]
        pools = [(data.labels == k).nonzero()[:, 0] for k in range(len(names))]
        real = data.images[torch.cat([pool[torch.arange(columns) % len(pool)] for pool in pools])]
        shown = torch.arange(len(names)).repeat_interleave(columns)
    picture = out / PICTURE
    pictured = sample(generator, len(real), labels=shown, seed=seed + 1)
    plots.save_comparison(picture, real, pictured, columns=columns, names=names)
    generated = sample(generator, m, labels=labels, seed=seed)
    table = report(
        data.images, generated, real_labels=data.labels, generated_labels=labels, seed=seed
    )
    return table, picture


@torch.no_grad()
def sample(
    generator: MLPGenerator, n: int, *, labels: Tensor | None = None, seed: int = 0
) -> Tensor:
    """n images `[n, C, H, W]` in [-1, 1] from seeded noise, of classes `labels [n]`.

    Without labels, a conditional generator's classes take turns.
    """
    noise = torch.randn(n, generator.noise_dim, generator=seeded(seed, 0))
    if labels is None and generator.classes:
        labels = torch.arange(n) % generator.classes
    images: Tensor = generator(noise, labels)
    return images


def read_run(out: Path) -> Run:
    """Read the `config.json` of a run.

    Raises:
        ValueError: it is missing, or is not one of fewstep.
    """
    path = out / CONFIG
    try:
        content = json.loads(path.read_text())
        config = TrainConfig(**{**content["config"], "flow": WFlow(**content["config"]["flow"])})
        return Run(config, tuple(map(int, content["image_shape"])), tuple(content["classes"]))
    except FileNotFoundError as error:
        raise ValueError(f"{out} holds no run of fewstep: {CONFIG} is missing") from error
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not the configuration of a run: {error}") from error


def method_of(out: Path) -> str:
    """The method of a run, by its `config.json`; "wflow" where that cannot tell."""
    try:
        return str(json.loads((out / CONFIG).read_text())["method"])
    except (OSError, ValueError, TypeError, KeyError):
        return "wflow"


def load_generator(out: Path) -> MLPGenerator:
    """The generator of a run, with the averaged weights of its last checkpoint.

    Raises:
        ValueError: no run, or a checkpoint that is missing, damaged or of another run.
    """
    generator = _generator(read_run(out))
    state = {f"ema.module.{name}": t for name, t in generator.state_dict().items()}
    checkpoint.restore(out / CHECKPOINT, state)
    return generator.eval()


def require_extra() -> None:
    """Raise ModuleNotFoundError if a package of `fewstep[train]` is not installed."""
    for name in EXTRA:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _open(run: Run, out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make `out` hold `run` and nothing of another run; refuse where that is not asked for."""
    config = out / CONFIG
    if resume:
        began, asked = ({**vars(r.config), **vars(r)} for r in (read_run(out), run))
        for name in sorted(began.keys() - {"config"}):
            if began[name] != asked[name]:
                raise ValueError(
                    f"{out} holds a run of another configuration: {name} is {began[name]},"
                    f" not {asked[name]}"
                )
        return
    if config.exists() or (out / CHECKPOINT).exists():
        read_run(out)
        if (out / CHECKPOINT).exists() and not overwrite:
            raise ValueError(f"{out} holds a run already: give --resume or --overwrite")
    start_run(out, "wflow", run.config, run.image_shape, classes=run.names)


def start_run(
    out: Path, method: str, config: Any, image_shape: tuple[int, ...], **more: object
) -> None:
    """Make `out` hold a new run, of a dataclass `config`, and nothing of one that it held."""
    path = out / CONFIG
    if path.exists() or (out / CHECKPOINT).exists():
        for file in (out / CHECKPOINT, out / PICTURE):
            file.unlink(missing_ok=True)
        shutil.rmtree(out / LOGS, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    content = {
        "fewstep": fewstep.__version__,
        "method": method,
        "config": asdict(config),
        "image_shape": image_shape,
        **more,
    }
    with checkpoint.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n")


def _fit(
    run: Run, data: Images, out: Path, device: torch.device, *, progress: bool
) -> MLPGenerator:
    from torch.utils.tensorboard import SummaryWriter
    from tqdm import tqdm  # type: ignore[import-untyped]

    config = run.config
    generator = _generator(run).to(device)
    averaging = get_ema_multi_avg_fn(config.ema)  # type: ignore[no-untyped-call]
    average = AveragedModel(generator, multi_avg_fn=averaging)
    optimizer = torch.optim.Adam(generator.parameters(), lr=config.lr, fused=True)
    done = 0
    if (out / CHECKPOINT).exists():
        allocate(optimizer)
        done = checkpoint.restore(out / CHECKPOINT, _state(generator, average, optimizer))

    writer = SummaryWriter(str(out / LOGS), purge_step=done)
    bar = tqdm(
        initial=done,
        total=config.steps,
        desc=config.data,
        unit="step",
        disable=not progress,
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    classes = _classes(data)
    with deferred_signals() as stopped, bar, writer:
        for step in range(done, config.steps):
            labels, noise, real = _draw(config, classes, step)
            cosine = (1 + math.cos(math.pi * step / config.steps)) / 2
            optimizer.param_groups[0]["lr"] = config.lr * cosine * min(1, (step + 1) / _WARM_UP)
            loss, metrics = config.flow(
                generator,
                noise.to(device),
                real.to(device),
                labels.to(device) if run.names else None,
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            average.update_parameters(generator)
            bar.update()

            save = (step + 1) % config.checkpoint_every == 0 or step + 1 == config.steps
            if save or stopped.is_set() or step % config.log_every == 0:
                values = {name: value.item() for name, value in metrics.items()}
                if not all(map(math.isfinite, values.values())):
                    raise FloatingPointError(f"not finite at step {step}: {values}; lower lr")
                bar.set_postfix(drift=f"{values['drift']:.4f}", refresh=False)
                if step % config.log_every == 0:
                    for name, value in (("loss", loss.item()), *values.items()):
                        writer.add_scalar(name, value, step)
            if save or stopped.is_set():
                writer.flush()
                state = _state(generator, average, optimizer)
                checkpoint.save(out / CHECKPOINT, state, step=step + 1)
            if stopped.is_set():
                raise KeyboardInterrupt(
                    f"stopped after step {step + 1} of {config.steps}; --resume continues"
                )
    return cast(MLPGenerator, average.module.cpu().eval())


def _generator(run: Run) -> MLPGenerator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.config.seed)
        return MLPGenerator(
            run.image_shape,
            classes=len(run.names),
            noise_dim=run.config.noise_dim,
            width=run.config.width,
            depth=run.config.depth,
        )


def torch_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {error}") from error
    return device


def _classes(data: Images) -> list[Tensor]:
    """The images of each class; all of them as one where there are no labels."""
    if data.labels is None:
        return [data.images]
    return [data.images[data.labels == k] for k in range(len(data.names))]


def _draw(config: TrainConfig, classes: list[Tensor], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Labels `[G]`, noise `[2, G, N, Z]` and real images `[G, N, C, H, W]` of one step.

    Images are drawn without replacement, or with it from a class of fewer than N.
    """
    rng = seeded(config.seed, step + 1)
    groups, n = min(config.groups, len(classes)), config.batch
    labels = torch.randperm(len(classes), generator=rng)[:groups]

    def choose(images: Tensor) -> Tensor:
        count = len(images)
        if count < n:
            return images[torch.randint(count, (n,), generator=rng)]
        return images[torch.randperm(count, generator=rng)[:n]]

    real = torch.stack([choose(classes[k]) for k in labels.tolist()])
    noise = torch.randn(2, groups, n, config.noise_dim, generator=rng)
    return labels, noise, real


def seeded(seed: int, step: int) -> torch.Generator:
    word = np.random.SeedSequence([seed, step]).generate_state(1)[0]
    return torch.Generator().manual_seed(int(word))


def _state(
    generator: MLPGenerator, average: AveragedModel, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The live tensors of a run, by their names in a checkpoint."""
    state = {f"model.{name}": t for name, t in generator.state_dict().items()}
    state |= {f"ema.{name}": t for name, t in average.state_dict().items()}
    for i, moments in optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
    return state


def allocate(optimizer: torch.optim.Optimizer) -> None:
    """Make Adam create its moments, which it does at its first step; `restore` fills them."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()


@contextmanager
def deferred_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event; the next one acts as ever."""
    stopped = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {number: signal.getsignal(number) for number in signals}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: FrameType | None) -> None:
        restore()
        stopped.set()

    for number in signals:
        signal.signal(number, stop)
    try:
        yield stopped
    finally:
        restore()
