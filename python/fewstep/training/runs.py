"""What all training methods share: settings, run folders, networks, and the course of a run."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import shutil
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, get_args

import torch
from torch import Tensor, nn

import fewstep
from fewstep._checks import check_config, count, one_of
from fewstep._files import one_writer, read_json, replacing
from fewstep._torch import seeded, torch_device
from fewstep.data.generate import Teacher
from fewstep.data.images import Images, load
from fewstep.samplers.seeds import latents
from fewstep.training import checkpoint
from fewstep.training.loop import (
    CHECKPOINT,
    GRIDS,
    LOGS,
    NUMBERS,
    Stage,
    TrainedNetwork,
    TrainPrecision,
    fit,
    prefix,
)
from fewstep.training.ranks import ALONE, Ranks, among, own_device

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CONFIG, PAIRS, PICTURE = "config.json", "pairs", "samples.png"
REPORT, TABLE = "report.json", "report.txt"
_SHOWN, _MOST_COLUMNS = 64, 16  # images of a grid
EXTRA = ("matplotlib", "mlxtend", "ot", "PIL", "safetensors", "sklearn", "tensorboard", "tqdm")
_SAME_SPREAD = 1e-5  # relative: sums of the same pixels differ that little between machines
T = TypeVar("T")


@dataclass(frozen=True)
class RunConfig:
    """Settings of a run that every method has.

    A method's own settings are the fields of a subclass. Integers are at least 1.

    Attributes:
        data: images to train on: "digits", "mnist5k", a .npy file or a folder of images.
        lr: peak learning rate of Adam. It rises over the first 50 steps and then falls to 0 along
            a cosine.
        ema: decay per step of the averaged weights, which draw the samples. At least 0, below 1.
        seed: seed of the first weights, the noise and the batches, at least 0.
        log_every: number of steps between two entries in the logs.
        checkpoint_every: number of steps between two checkpoints.
        device: device to train on, such as "cpu" or "cuda:0". "auto" takes a GPU where there is
            one.
        size: width and height in pixels that images of a folder are cropped and resized to. 0
            leaves them as they are.
        precision: "bf16" runs networks under autocast in bfloat16. Weights, losses and kernels stay
            in float32.
        compile: compilation of the networks by `torch.compile`.
        clip: largest norm of a network's gradient. A longer gradient is scaled down to it.
        accumulate: number of micro-batches that a step's batch is divided into, on each rank of
            torchrun. The gradient is that of the whole batch.
        shard: division of weights, averages and moments between the ranks of torchrun, by FSDP2. It
            is for methods of one network.

    Raises:
        ValueError: a number is outside its range.
        TypeError: a value is of the wrong type.
    """

    data: str
    lr: float = 2e-3
    ema: float = 0.995
    seed: int = 0
    log_every: int = 10
    checkpoint_every: int = 250
    device: str = "auto"
    size: int = 0
    precision: TrainPrecision = "fp32"
    compile: bool = False
    clip: float | None = None
    accumulate: int = 1
    shard: bool = False

    def __post_init__(self) -> None:
        own = [f.name for f in dataclasses.fields(self) if f.type == "int"]
        sizes = [name for name in own if name not in ("seed", "size")]
        check_config(self, *sizes)
        who = type(self).__name__
        object.__setattr__(self, "size", count(who, "size", self.size, 0))
        one_of(who, "precision", self.precision, get_args(TrainPrecision))
        if self.clip is not None and not 0 < self.clip < math.inf:
            raise ValueError(f"clip must be positive and finite, got {self.clip!r}")


C = TypeVar("C", bound=RunConfig)


@dataclass(frozen=True)
class Run(Generic[C]):
    """The content of a run's `config.json`.

    Attributes:
        config: settings of the method.
        image_shape: shape `[C, H, W]` of an image.
        classes: names of the classes that the networks are conditioned on; empty for none.
        sigma_data: standard deviation over all pixels of the data. It is NaN in a run of an
            earlier version that did not note it.
    """

    config: C
    image_shape: tuple[int, ...]
    classes: tuple[str, ...] = ()
    sigma_data: float = math.nan


@dataclass(frozen=True)
class NetworkRecipe:
    """How a network of a run is made and trained.

    Attributes:
        make: function that makes the module.
        seed: seed of its first weights.
        lr: peak learning rate of Adam.
        ema: decay of the averaged weights; None keeps no average.
        betas: decay rates of Adam's moments.
    """

    make: Callable[[], nn.Module]
    seed: int
    lr: float
    ema: float | None
    betas: tuple[float, float] = (0.9, 0.999)

    def module(self) -> nn.Module:
        """The module with its first weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return self.make()


@dataclass(frozen=True)
class Session(Generic[C]):
    """A run at work: what a method's stages and its report are given.

    Attributes:
        run: content of the run's `config.json`.
        data: images to train on.
        networks: networks in training, by name.
        out: folder of the run.
        device: device of the networks.
        progress: whether progress bars are shown.
        ranks: processes that train together.
    """

    run: Run[C]
    data: Images
    networks: Mapping[str, TrainedNetwork]
    out: Path
    device: torch.device
    progress: bool
    ranks: Ranks = ALONE

    def parts(
        self, n: int, rng: torch.Generator
    ) -> Iterator[tuple[slice, Tensor, torch.Generator]]:
        """This rank's micro-batches of a batch of n: rows, their ids, and a generator in the state
        of `rng`, so that a sample's numbers depend on nothing but its place in the batch."""
        for rows in self.ranks.rows(n, self.run.config.accumulate):
            own = torch.Generator()
            own.set_state(rng.get_state())
            yield rows, torch.arange(n)[rows], own


@dataclass(frozen=True)
class Report:
    """How well a run's networks do. Methods add their numbers in a subclass.

    Attributes:
        table: numbers in plain text.
        picture: path of the PNG with real and generated images.
    """

    table: str
    picture: Path


R = TypeVar("R", bound=Report)


@dataclass(frozen=True)
class TrainResult(Generic[R]):
    """What `Trainer.train` returns.

    Attributes:
        network: network that draws samples, one of `networks`.
        networks: networks by name, with averaged weights, on the CPU and in evaluation mode.
        report: numbers and picture.
    """

    network: nn.Module
    networks: dict[str, nn.Module]
    report: R


@dataclass(frozen=True)
class Trainer(Generic[C, R]):
    """A training method: all that the commands know of it.

    Attributes:
        name: word that follows `fewstep train`; `config.json` holds it as the method.
        summary: sentence that says what the method trains.
        config: class of its settings, whose fields are the options of the command.
        presets: settings by data set. A user's own data take those of "mnist5k".
        networks: function that lists a run's networks by name.
        stages: function that lists the stages of a session, in order.
        report: function that measures and pictures the averaged networks of a session.
        sample: function `(network, run, n, *, seed)` that draws n images `[n, C, H, W]` in [-1, 1].
            If it also takes `steps`, `sampler` or `scale`, `fewstep sample` passes these on.
        network: name of the network that draws samples.
        teacher: function that makes a teacher for `fewstep pairs` of the network named "teacher";
            None where the method has none.
        conditional: function that says whether a run's networks take the classes of the data.
        batches: names of the settings that are numbers of samples, which ranks and micro-batches
            divide between them.
        longer: name of the setting that may grow when a run is resumed: the number of steps of the
            last stage. Empty where several stages have it.
    """

    name: str
    summary: str
    config: type[C]
    presets: Mapping[str, C]
    networks: Callable[[Run[C]], dict[str, NetworkRecipe]]
    stages: Callable[[Session[C]], Sequence[Stage]]
    report: Callable[[Session[C], dict[str, nn.Module]], R]
    sample: Callable[..., Tensor]
    network: str = "student"
    teacher: Callable[[nn.Module, Run[C]], Teacher] | None = None
    conditional: Callable[[C], bool] = lambda config: True
    batches: tuple[str, ...] = ("batch",)
    longer: str = "steps"

    def preset(self, data: str) -> C:
        """The default settings for a data set."""
        return self.presets.get(data) or replace(self.presets["mnist5k"], data=data)

    def read_run(self, out: Path) -> Run[C]:
        """Read the `config.json` of a run.

        Raises:
            ValueError: the file is missing, or the run is of another method.
        """

        def parse(content: dict[str, Any]) -> Run[C]:
            if (method := method_in(content)) != self.name:
                raise ValueError(f"its method is {method}: name it in place of {self.name}")
            config = _config_in(self.config, content["config"])
            shape, sigma_data = shape_in(content), float(content.get("sigma_data", math.nan))
            return Run(config, shape, classes_in(content), sigma_data)

        return read_config(out, parse, kind=f"a run of {self.name}")

    def load(self, out: Path, name: str | None = None) -> tuple[nn.Module, Run[C]]:
        """A network of a run, with the averaged weights of its last checkpoint, and the run.

        Args:
            out (Path): folder of the run.
            name (str | None): name of the network; None for the one that draws samples.

        Raises:
            ValueError: there is no run, or its checkpoint is missing, damaged or of another run.
        """
        run, name = self.read_run(out), self.network if name is None else name
        make = self.networks(run)[name].module
        return checkpoint.restored(out / CHECKPOINT, f"{prefix(name)}ema.module.", make), run

    def train(
        self,
        config: C,
        out: Path,
        *,
        resume: bool = False,
        overwrite: bool = False,
        progress: bool = True,
        process_group: ProcessGroup | None = None,
    ) -> TrainResult[R]:
        """Train the networks of a run, then measure and picture them.

        The folder `out` gets `config.json`, `checkpoint.safetensors`, TensorBoard `logs`, their
        numbers in `metrics.csv`, `samples.png`, the table in `report.txt` and `report.json`, and in
        `grids` a picture of samples at each checkpoint. Checkpoints are written every
        `checkpoint_every` steps, at the end of each stage, and on Ctrl-C or SIGTERM. The random
        numbers of a step depend on the seed and the step alone. A resumed run therefore repeats the
        uninterrupted one bit for bit on the same machine with the same number of threads.

        Args:
            config (RunConfig): settings; `preset(data)` returns the defaults.
            out (Path): folder of the run, made if need be.
            resume (bool): continue from the checkpoint in `out`, with the settings it began with;
                the steps of the last stage may be more.
            overwrite (bool): replace a run that is in `out`.
            progress (bool): show progress bars on stderr.
            process_group (ProcessGroup | None): ranks of torch.distributed that train together. All
                must make the call, with one folder that they all see. Losses and steps are those
                of one process, but for rounding, and a run may be resumed on other numbers of
                ranks. Each rank holds the data and the networks. The first writes.

        Returns:
            TrainResult: networks, numbers and picture.

        Raises:
            ValueError: the data cannot be loaded, `out` is in use by another run or process,
                a checkpoint is damaged or of another run, or a batch cannot be divided.
            FloatingPointError: a loss is no longer finite. The last good checkpoint stays.
            KeyboardInterrupt: Ctrl-C or SIGTERM came, and a checkpoint was written.
            ModuleNotFoundError: a package of the extra `train` is missing.

        >>> import tempfile
        >>> from fewstep.training import wflow
        >>> config = replace(wflow.preset("digits"), steps=2, batch=8, width=16)
        >>> result = wflow.train(config, Path(tempfile.mkdtemp()), progress=False)
        >>> result.report.picture.name
        'samples.png'
        """
        require_extra()
        ranks = among(process_group)
        with ExitStack() as stack:
            prepare = partial(
                self._prepared, config, out, resume, overwrite, progress, ranks, stack
            )
            session = ranks.agreed(prepare)
            networks, run = session.networks, session.run
            fit(
                self.stages(session),
                networks,
                out,
                title=config.data,
                log_every=config.log_every,
                checkpoint_every=config.checkpoint_every,
                progress=progress,
                drawn=(self.network, lambda network: self.drawn(network, run)),
                ranks=ranks,
            )
            done = {
                name: network.plain()
                for name, network in networks.items()
                if network.average is not None
            }

            def measured() -> R:
                report = self.report(session, done)
                _write_report(out, report)
                return report

            report = ranks.once(measured)
        return TrainResult(done[self.network], done, report)

    def _prepared(
        self,
        config: C,
        out: Path,
        resume: bool,
        overwrite: bool,
        progress: bool,
        ranks: Ranks,
        stack: ExitStack,
    ) -> tuple[Session[C], dict[str, str]]:
        """The session, and what must be the same on all ranks."""
        for name in self.batches:
            ranks.divide(name, getattr(config, name), config.accumulate)
        data = load_enough(config.data, size=config.size)
        device = torch_device(config.device)
        device = device if ranks.group is None else own_device(device)
        shape = tuple(data.images.shape[1:])
        names = data.names if self.conditional(config) else ()
        run = Run(config, shape, names, float(data.images.std()))
        began = self.read_run(out) if resume else None
        self.networks(run)  # raises what it has to say before a folder is touched
        if ranks.first:
            stack.enter_context(one_writer(out))
            if began is None:
                _begin(out, self.name, run, overwrite=overwrite)
        if began is not None:
            run = _resumed(out, began, run, self.longer)
            if run != began and ranks.first:
                _write_config(out, self.name, run)
        recipes, path = self.networks(run), out / CHECKPOINT
        if config.shard and (ranks.group is None or len(recipes) > 1):
            raise ValueError(
                "shard needs several ranks and a method of one network, got"
                f" {ranks.world} ranks and {len(recipes)} networks of {self.name}"
            )
        if began is not None and path.exists():
            modules = {f"{prefix(name)}model.": r.module for name, r in recipes.items()}
            checkpoint.check_shapes(path, modules)
        networks = {
            name: TrainedNetwork(
                r.module().to(device),
                lr=r.lr,
                ema=r.ema,
                betas=r.betas,
                clip=config.clip,
                precision=config.precision,
                compiled=config.compile,
                ranks=ranks,
                shard=config.shard,
            )
            for name, r in recipes.items()
        }
        facts = {name: str(value) for name, value in _flat(run).items()}
        facts["the number of images"] = str(len(data.images))
        return Session(run, data, networks, out, device, progress, ranks), facts

    def drawn(self, network: nn.Module, run: Run[C]) -> tuple[Tensor, int, Sequence[str]]:
        """Samples of a network in training, in how many columns to show them, and their names."""
        columns, names = grid_columns(_SHOWN, run.classes[:_MOST_COLUMNS])
        n = max(1, _SHOWN // columns) * columns
        names = names if len(run.classes) <= _MOST_COLUMNS else ()
        return self.sample(network, run, n, seed=0), columns, names

    def take_teacher(self, session: Session[C], folder: Path, *same: str) -> None:
        """Copy the averaged weights of another run's teacher into this one's.

        Args:
            session (Session): the run that takes them.
            folder (Path): folder of the other run.
            same (str): settings, and attributes of `Run`, that both runs must have in common.

        Raises:
            ValueError: there is no run, they differ in one of `same`, or the checkpoint is damaged.
        """
        its, own = _flat(self.read_run(folder)), _flat(session.run)
        for name in same:
            if not _agree(name, its[name], own[name]):
                raise ValueError(f"teacher: {folder} has {name} {its[name]}, not {own[name]}")
        state = session.networks["teacher"].state()
        average = {f"teacher.{key}": t for key, t in state.items() if key.startswith("ema.")}
        checkpoint.restore(folder / CHECKPOINT, average)


def grid_columns(n: int, classes: Sequence[str]) -> tuple[int, Sequence[str]]:
    """Columns of a grid of n samples, about as many as rows, and their names.

    Classes take turns, so a column is of one class.
    """
    side = math.ceil(math.sqrt(n))
    if not classes:
        return side, ()
    names = [*classes] * max(1, round(side / len(classes)))
    return min(n, len(names)), names[:n]


def sample_noise(n: int, shape: Sequence[int], *, seed: int) -> Tensor:
    """Standard normals `[n, *shape]` for samples. The first k do not depend on n."""
    first = torch.randint(2**62, (), generator=seeded(seed, 0))
    return latents(first + torch.arange(n), shape)


def read_config(out: Path, parse: Callable[[dict[str, Any]], T], *, kind: str = "a run") -> T:
    """What `parse` makes of a run's `config.json`.

    Raises:
        ValueError: the file is missing, or `parse` raises.
    """
    path = out / CONFIG
    try:
        return parse(read_json(path))
    except FileNotFoundError as error:
        raise ValueError(f"{out} holds no run of fewstep: {CONFIG} is missing") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise ValueError(f"{path} is not the configuration of {kind}: {error}") from error


def method_in(content: dict[str, Any]) -> str:
    """The method in a `config.json`. The first runs named none and were of "wflow"."""
    return str(content.get("method", "wflow"))


def shape_in(content: dict[str, Any]) -> tuple[int, ...]:
    """The shape `[C, H, W]` of a run's images."""
    shape = tuple(map(int, content["image_shape"]))
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"image_shape must be [C, H, W], got {content['image_shape']}")
    return shape


def classes_in(content: dict[str, Any]) -> tuple[str, ...]:
    """The names of a run's classes; none in a file that lists none."""
    classes = content.get("classes", [])
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise TypeError(f"classes must be a list of names, got {classes}")
    return tuple(classes)


def nested(config: type[RunConfig]) -> dict[str, type]:
    """The fields of a method's settings that are dataclasses themselves, with their types."""
    hints = typing.get_type_hints(config)
    return {
        f.name: hints[f.name] for f in dataclasses.fields(config) if is_dataclass(hints[f.name])
    }


def _config_in(config: type[C], content: dict[str, Any]) -> C:
    inner = {name: kind(**_from_json(content[name])) for name, kind in nested(config).items()}
    return config(**{**_from_json(content), **inner})


def _from_json(content: dict[str, Any]) -> dict[str, Any]:
    """Settings with dtypes in place of the names that `_begin` writes."""

    def read(value: Any) -> Any:
        dtype = isinstance(value, str) and value.startswith("torch.")
        return getattr(torch, value.removeprefix("torch.")) if dtype else value

    return {name: read(value) for name, value in content.items()}


def require_extra() -> None:
    """Raise ModuleNotFoundError unless every package of the extra `train` is installed."""
    for name in EXTRA:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def load_enough(source: str, *, size: int = 0) -> Images:
    """Load images with `fewstep.data.images.load`, at least as many as the metrics need.

    Raises:
        ValueError: the data cannot be loaded, or there are fewer than 12 images.
    """
    data = load(source, size=size)
    if len(data.images) < 12:
        raise ValueError(f"data: must have at least 12 images, got {len(data.images)}")
    return data


def _flat(run: Run[C]) -> dict[str, Any]:
    """Settings and facts of a run by name."""
    return {name: v for name, v in (vars(run.config) | vars(run)).items() if name != "config"}


def _agree(name: str, noted: Any, own: Any) -> bool:
    """Whether an entry of another run's file is this run's, or was not noted."""
    if name != "sigma_data":
        return bool(noted == own)
    return math.isnan(noted) or math.isclose(noted, own, rel_tol=_SAME_SPREAD)


def _resumed(out: Path, began: Run[C], asked: Run[C], longer: str) -> Run[C]:
    """The run with the steps asked for.

    Raises:
        ValueError: other settings or data are not those it began with.
    """
    before, after = _flat(began), _flat(asked)
    for name in sorted(after):
        if name == longer and after[name] > before[name]:
            continue
        if not _agree(name, before[name], after[name]):
            raise ValueError(
                f"{out} holds a run of another configuration: {name} is {before[name]},"
                f" not {after[name]}"
            )
    if longer not in after:
        return began
    config = replace(began.config, **{longer: after[longer]})
    return replace(began, config=config)


def _write_report(out: Path, report: Report) -> None:
    """The table as text, and all numbers of the report as JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.tolist()
        return asdict(value) if is_dataclass(value) and not isinstance(value, type) else str(value)

    content = {f.name: getattr(report, f.name) for f in dataclasses.fields(report)}
    del content["table"], content["picture"]
    numbers = json.dumps(content, indent=2, default=plain)
    for name, text in ((TABLE, report.table), (REPORT, numbers)):
        with replacing(out / name) as temporary:
            temporary.write_text(text + "\n")


def _begin(out: Path, method: str, run: Run[C], *, overwrite: bool) -> None:
    """Make `out` the folder of a new run, without anything of an earlier one.

    Raises:
        ValueError: `out` holds a run and `overwrite` is not given, or it holds something else.
    """
    path = out / CONFIG
    if path.exists() or (out / CHECKPOINT).exists():
        read_config(out, lambda content: content["fewstep"])
        if (out / CHECKPOINT).exists() and not overwrite:
            raise ValueError(f"{out} holds a run already: give --resume or --overwrite")
        for file in (CHECKPOINT, PICTURE, NUMBERS, TABLE, REPORT):
            (out / file).unlink(missing_ok=True)
        for folder in (LOGS, PAIRS, GRIDS):
            shutil.rmtree(out / folder, ignore_errors=True)
    out.mkdir(parents=True, exist_ok=True)
    _write_config(out, method, run)


def _write_config(out: Path, method: str, run: Run[C]) -> None:
    content = {"fewstep": fewstep.__version__, "method": method, **asdict(run)}
    with replacing(out / CONFIG) as temporary:
        temporary.write_text(json.dumps(content, indent=2, default=str) + "\n")
