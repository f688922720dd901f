"""The loop that all trainers share: stages of optimizer steps, with checkpoints and logs."""

from __future__ import annotations

import contextlib
import copy
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TextIO

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fewstep._files import replacing
from fewstep._ranks import checksum
from fewstep.training import checkpoint, plots
from fewstep.training.ranks import ALONE, Ranks, is_sharded, whole

CHECKPOINT, LOGS, NUMBERS, GRIDS = "checkpoint.safetensors", "logs", "metrics.csv", "grids"
_WARM_UP = 50  # steps
Losses = tuple[Tensor, dict[str, Tensor]]
TrainPrecision = Literal["fp32", "bf16"]


class TrainedNetwork:
    """A network in training, with the average of its weights and with Adam.

    Args:
        model (nn.Module): network, on the device where it trains.
        lr (float): peak learning rate.
        ema (float | None): decay per step of the averaged weights. None keeps no average.
        betas (tuple): decay rates of Adam's moments.
        clip (float | None): largest norm of the gradient.
        precision (str): "fp32", or "bf16" for networks under autocast.
        compiled (bool): whether the network is compiled by `torch.compile`.
        ranks (Ranks): processes whose gradients are averaged.
        shard (bool): whether the ranks divide weights, averages and moments between them.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float,
        ema: float | None,
        betas: tuple[float, float] = (0.9, 0.999),
        clip: float | None = None,
        precision: TrainPrecision = "fp32",
        compiled: bool = False,
        ranks: Ranks = ALONE,
        shard: bool = False,
    ) -> None:
        self.model = model
        self.lr = lr
        self.clip, self.precision, self.ranks = clip, precision, ranks
        self.average: AveragedModel | None = None
        if ema is not None:
            averaging = get_ema_multi_avg_fn(ema)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(model, multi_avg_fn=averaging)
        self._like = copy.deepcopy(model).to("meta") if shard else None
        if shard:
            device = next(model.parameters()).device
            for module in (model, self.average.module if self.average is not None else None):
                if module is not None:
                    ranks.shard(module, device)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=0.0, betas=betas, fused=True)
        self._allocate()
        if compiled:
            model.compile()

    def _allocate(self) -> None:
        """Make Adam create its moments. It does so at its first step, which has length 0 here."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()
        for moments in self.optimizer.state.values():
            for t in moments.values():
                t.zero_()

    @property
    def averaged(self) -> nn.Module:
        """The network with its averaged weights."""
        if self.average is None:
            raise ValueError("averaged: this network keeps no average of its weights")
        return self.average.module

    def plain(self) -> nn.Module:
        """A copy of the network with its averaged weights, on the CPU and in evaluation mode. All
        ranks must ask."""
        if self._like is None:
            return copy.deepcopy(self.averaged).cpu().eval()
        own = copy.deepcopy(self._like).to_empty(device="cpu")
        own.load_state_dict({k: whole(t).cpu() for k, t in self.averaged.state_dict().items()})
        return own.eval()

    def step(
        self, losses: Sequence[Callable[[], Losses]], progress: float, step: int
    ) -> dict[str, Tensor]:
        """Take an optimizer step at the learning rate of `progress`, the share of steps done.

        The rate rises over the first 50 steps and then falls to 0 along a cosine. The gradient is
        that of the mean of some losses, which are called in turn, each a loss and its metrics.

        Returns:
            dict: the loss and the metrics, means over the losses.
        """
        cosine = (1 + math.cos(math.pi * progress)) / 2
        self.optimizer.param_groups[0]["lr"] = self.lr * cosine * min(1, (step + 1) / _WARM_UP)
        self.optimizer.zero_grad()
        found: list[dict[str, Tensor]] = []
        device = next(self.model.parameters()).device.type
        for make in losses:
            with torch.autocast(device, torch.bfloat16, enabled=self.precision == "bf16"):
                loss, metrics = make()
            (loss / len(losses)).backward()  # type: ignore[no-untyped-call]
            found.append({"loss": loss.detach(), **metrics})
        self.ranks.mean_gradients(self.model.parameters())
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        if len(found) == 1:
            return found[0]
        return {name: torch.stack([one[name] for one in found]).mean(0) for name in found[0]}

    def state(self) -> dict[str, Tensor]:
        """The live tensors, by their names in a checkpoint."""
        state = {f"model.{name}": t for name, t in self.model.state_dict().items()}
        if self.average is not None:
            state |= {f"ema.{name}": t for name, t in self.average.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            state |= {f"optimizer.{i}.{name}": t for name, t in moments.items()}
        return state

    @torch.no_grad()
    def copy(self, source: nn.Module) -> None:
        """Copy another network's weights into this one and its average."""
        targets = [self.model] if self.average is None else [self.model, self.average.module]
        for target in targets:
            for own, t in zip(target.parameters(), source.parameters(), strict=True):
                own.copy_(t)


@dataclass(frozen=True)
class Stage:
    """A part of a run, whose steps are of one kind.

    Attributes:
        name: name that its entries in the logs and the progress bar begin with. It may be empty.
        steps: number of steps.
        update: function that takes step i of the stage and returns its scalars. The progress bar
            shows the first.
        begin: function called once before the first step of the stage, or before step i from which
            a resumed run continues.
        state: tensors by name that checkpoints keep with the networks. Steps change them in place.
    """

    name: str
    steps: int
    update: Callable[[int], dict[str, Tensor]]
    begin: Callable[[int], None] = lambda step: None
    state: Mapping[str, Tensor] = field(default_factory=dict)


def prefix(name: str) -> str:
    """What the names of a network's tensors begin with in a checkpoint, nothing for the name ""."""
    return f"{name}." if name else ""


def _tensors(networks: Mapping[str, TrainedNetwork], stages: Sequence[Stage]) -> dict[str, Tensor]:
    return {
        f"{prefix(name)}{key}": t
        for name, network in networks.items()
        for key, t in network.state().items()
    } | {f"{prefix(stage.name)}{key}": t for stage in stages for key, t in stage.state.items()}


def fit(
    stages: Sequence[Stage],
    networks: Mapping[str, TrainedNetwork],
    out: Path,
    *,
    title: str,
    log_every: int,
    checkpoint_every: int,
    progress: bool,
    drawn: tuple[str, Callable[[nn.Module], tuple[Tensor, int, Sequence[str]]]] | None = None,
    ranks: Ranks = ALONE,
) -> None:
    """Take all steps, or those that the checkpoint in `out` leaves to do.

    A checkpoint is written every `checkpoint_every` steps, at the end of each stage, and on Ctrl-C
    or SIGTERM. TensorBoard's logs and `metrics.csv` are in the same folder. `drawn` is the name of
    a network and a function that draws images of its average and gives their columns and the
    columns' names: at each checkpoint of that network's stage they become a picture. The first of
    several ranks writes all of these. What is logged is the mean over the ranks, and a signal to
    one of them stops all after the same step.

    Raises:
        ValueError: a checkpoint is damaged or of another run.
        FloatingPointError: a scalar is no longer finite. The last good checkpoint stays.
        KeyboardInterrupt: Ctrl-C or SIGTERM came, and a checkpoint was written.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    path, total = out / CHECKPOINT, sum(stage.steps for stage in stages)

    def restored() -> tuple[int, dict[str, str]]:
        done = checkpoint.restore(path, _tensors(networks, stages)) if path.exists() else 0
        return done, {"the number of steps done": str(done), **_weights(networks)}

    done = ranks.agreed(restored)
    bar = tqdm(
        initial=done,
        total=total,
        desc=title,
        unit="step",
        disable=not (progress and ranks.first),
        mininterval=0.2 if sys.stderr.isatty() else 10,
    )
    first = 0  # step of the run at which the stage begins
    if progress and ranks.first and done < total:
        sys.stderr.write(f"logs: tensorboard --logdir {out / LOGS}, or {out / NUMBERS}\n")
    with contextlib.ExitStack() as stack:
        stack.enter_context(bar)
        writer = stack.enter_context(_logs(out / LOGS, done)) if ranks.first else None
        numbers = stack.enter_context(_numbers(out / NUMBERS, done)) if ranks.first else None
        for stage in stages:
            start, first = max(done - first, 0), first + stage.steps
            if start >= stage.steps:
                continue
            stage.begin(start)
            label = f"{stage.name}/" if stage.name else ""
            with deferred_signals() as stopped:
                for step in range(start, stage.steps):
                    scalars = stage.update(step)
                    bar.update()
                    at = first - stage.steps + step + 1
                    stop = ranks.any(stopped.is_set())
                    save = at % checkpoint_every == 0 or step + 1 == stage.steps
                    if save or stop or step % log_every == 0:
                        values = ranks.means({name: t.item() for name, t in scalars.items()})
                        if not all(map(math.isfinite, values.values())):
                            raise FloatingPointError(
                                f"not finite at step {at - 1}: {values}; lower lr"
                            )
                        shown, value = next(iter(values.items()))
                        bar.set_postfix_str(f"{label}{shown}={value:.4f}", refresh=False)
                        if writer is not None and numbers is not None and step % log_every == 0:
                            for name, value in values.items():
                                writer.add_scalar(label + name, value, at - 1)
                                numbers.write(f"{at - 1},{label}{name},{value:.9g}\n")
                    if save or stop:
                        ranks.agreed(lambda: (None, _weights(networks)))
                        # Of sharded networks each rank gives its part.
                        tensors = {k: whole(t) for k, t in _tensors(networks, stages).items()}
                        shown_now = save and drawn is not None and stage.name == drawn[0]
                        plain = networks[stage.name].plain() if shown_now else None
                    if writer is not None and numbers is not None and (save or stop):
                        writer.flush()
                        numbers.flush()
                        checkpoint.save(path, tensors, step=at)
                        if drawn is not None and plain is not None:
                            _show(drawn[1], plain, out, at, writer)
                    if stop:
                        raise KeyboardInterrupt(
                            f"stopped after step {at} of {total}; --resume continues"
                        )
    ranks.wait()


def _weights(networks: Mapping[str, TrainedNetwork]) -> dict[str, str]:
    """What ranks must have in common at a checkpoint."""
    return {
        f"the weights of {name or 'the network'}": ", ".join(
            checksum(p) for p in network.model.parameters() if not is_sharded(p)
        )
        for name, network in networks.items()
    }


@contextmanager
def _numbers(path: Path, done: int) -> Iterator[TextIO]:
    """A CSV file of what is logged, without the entries of steps that are taken again."""
    lines = path.read_text().splitlines()[1:] if path.exists() else []
    kept = [line for line in lines if line.count(",") == 2 and int(line.split(",")[0]) < done]
    with replacing(path) as temporary:
        temporary.write_text("\n".join(["step,name,value", *kept, ""]))
    with path.open("a") as file:
        yield file


@torch.no_grad()
def _show(
    draw: Callable[[nn.Module], tuple[Tensor, int, Sequence[str]]],
    network: nn.Module,
    out: Path,
    step: int,
    writer: Any,
) -> None:
    images, columns, names = draw(network)
    (out / GRIDS).mkdir(exist_ok=True)
    path, title = out / GRIDS / f"{step:06d}.png", f"{out.name}: samples after step {step}"
    plots.save_grid(path, images, columns=columns, title=title, names=names)
    picture = plots.montage(images, columns, gap=1).numpy()
    writer.add_image("samples", picture, step, dataformats="HWC")


@contextmanager
def _logs(folder: Path, done: int) -> Iterator[Any]:
    """TensorBoard's writer. Its `flush` raises the errors of its thread, which prints none."""
    from torch.utils.tensorboard import SummaryWriter

    usual = threading.excepthook

    def report(of: Any) -> None:
        if not issubclass(of.exc_type, OSError):
            usual(of)

    threading.excepthook = report
    try:
        with SummaryWriter(str(folder), purge_step=done) as writer:
            yield writer
    finally:
        threading.excepthook = usual


@contextmanager
def deferred_signals() -> Iterator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into an event. The next one acts as usual."""
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
