"""The commands of `fewstep`, their options, and what they do.

The options of `fewstep train METHOD` are the fields of the method's settings, grouped by the class
that declares them, with their docstrings as help.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import inspect
import io
import itertools
import re
import sys
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Union

import docstring_parser
import numpy as np
import torch
import tyro

from fewstep._files import replacing
from fewstep._names import Reuse
from fewstep.data.generate import Teacher, generate, worker
from fewstep.data.pairs import MANIFEST, PairsConfig
from fewstep.training import plots
from fewstep.training.encoder import imported
from fewstep.training.loop import CHECKPOINT
from fewstep.training.ranks import among, joined
from fewstep.training.registry import TRAINERS, trainer_of
from fewstep.training.runs import RunConfig, Trainer, grid_columns, nested
from fewstep.verification import report

_OF_THE_RUN = ("data", "size", "seed", "device", "log_every", "checkpoint_every")
_COMMANDS = ("train", "pairs", "sample", "verify")
_LR_OF_TRANSFORMERS = 4e-4
_OF_MLP = ("noise_dim", "width", "depth")
_NOT_OPTIONS = (torch.dtype | None,)  # types without a spelling in a shell


class Command(Protocol):
    """What a shell asked for."""

    def execute(self) -> None:
        """Do it, and print what came of it."""


@dataclass(frozen=True, kw_only=True)
class Folder:
    """Where a run is.

    Attributes:
        out: folder of the run, made if need be.
        resume: continue the run in that folder, with its own settings.
        overwrite: replace the run in that folder.
    """

    out: Path
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Train:
    """Train a generator of images, then compare its samples with the real images.

    Attributes:
        method: Training method.
    """

    method: TrainMethod

    def execute(self) -> None:
        self.method.execute()


@dataclass(frozen=True)
class TrainMethod:
    """The options of `fewstep train METHOD`; `_form` makes a subclass for each method."""

    trainer: ClassVar[Trainer[Any, Any]]
    defaults: ClassVar[RunConfig]
    run: Any
    training: Any

    def config(self) -> RunConfig:
        """The settings that the options give.

        Raises:
            ValueError: a number is outside its range, or a name is unknown.
        """
        names = {f.name for f in dataclasses.fields(self.defaults)}
        given = {**vars(self.run), **vars(self.training)}
        for name in nested(self.trainer.config):
            loss = vars(getattr(self, _label(self.trainer, name)))
            given[name] = dataclasses.replace(getattr(self.defaults, name), **loss)
        config = dataclasses.replace(self.defaults, **{n: given[n] for n in names & given.keys()})
        if (network := getattr(config, "network", "mlp")) != "mlp":
            for name in _OF_MLP:
                if (value := getattr(config, name, None)) != getattr(self.defaults, name, None):
                    raise ValueError(f"{name} is for network mlp, got {value} for {network}")
        return config

    def execute(self) -> None:
        folder: Folder = self.run
        with joined() as group:
            result = self.trainer.train(
                self.config(),
                folder.out,
                resume=folder.resume,
                overwrite=folder.overwrite,
                process_group=group,
            )
            if among(group).first:
                report = result.report
                sys.stdout.write(f"\n{report.table}\n\n{report.picture}\n")


@dataclass(frozen=True)
class Pairs:
    """Make pairs of noise and a teacher's image of it. Files that exist are verified and kept.

    Attributes:
        teacher: teacher of the images. It is the folder of a run, or its checkpoint, or MODULE:NAME
            of a `fewstep.data.generate.Teacher` or of a function that returns one.
        out: folder of the pairs, made if need be.
        pairs: Which pairs to make, and how.
        shard: share of the files to make, as i/n with i from 0 to n - 1. The ranks of torchrun
            divide it between them.
        device: device of the teacher. "auto" takes a GPU where there is one.
    """

    teacher: str
    out: Path
    pairs: PairsConfig = field(default_factory=PairsConfig)
    shard: str = "0/1"
    device: str = "auto"

    def execute(self) -> None:
        shard = worker(self.shard)
        teacher = _teacher(self.teacher)
        missing = generate(teacher, self.pairs, self.out, worker=shard, device=self.device)
        state = f"{missing} files to be made by others" if missing else MANIFEST
        sys.stdout.write(f"{self.out}: {state}\n")


def _teacher(source: str) -> Teacher:
    """What `--teacher` names.

    Raises:
        ValueError: neither a run with a teacher nor a `Teacher` in a module.
    """
    name = source.partition(":")[2]
    path = Path(source)
    if not source or source.startswith(":"):
        raise ValueError(f"teacher: must be a folder, a checkpoint or MODULE:NAME, got {source!r}")
    if name and not path.exists():
        return imported("teacher", source, Teacher)
    folder = path.parent if path.name == CHECKPOINT else path
    trainer = trainer_of(folder)
    if trainer.teacher is None:
        able = " or ".join(other.name for other in TRAINERS.values() if other.teacher)
        raise ValueError(
            f"teacher: {folder} is a run of {trainer.name}, which has no teacher:"
            f" give one of {able}"
        )
    return trainer.teacher(*trainer.load(folder, "teacher"))


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained generator into a picture, a class per column, or an array.

    Attributes:
        folder: folder of the run.
        out: path of the file. A .png is a picture, and a .npy holds the samples as a float32 array
            [n, C, H, W] in [-1, 1].
        n: number of samples. The first of them are the same for any number.
        seed: seed of the noise, at least 0.
        steps: number of evaluations of the network per sample, for runs of lines and meanflow. 1 if
            not given.
        sampler: way from one step to the next, for runs of lines. "fresh" draws new noise and is
            taken if none is given, "line" follows the line, and "reuse" adds the same noise again.
        scale: scale of guidance, at least 1, for runs of wflow or drifting that were trained with
            `--scale-high`. 1 if not given.
    """

    folder: tyro.conf.Positional[Path]
    out: Path
    n: int = 64
    seed: int = 0
    steps: int | None = None
    sampler: Reuse | None = None
    scale: float | None = None

    def execute(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        kind = self.out.suffix.lower()
        if kind not in (".png", ".npy"):
            raise ValueError(f"out must be a .png or .npy file, got {self.out}")
        trainer = trainer_of(self.folder)
        own = {name: getattr(self, name) for name in ("steps", "sampler", "scale")}
        own = {name: value for name, value in own.items() if value is not None}
        for name, value in own.items():
            able = [t.name for t in TRAINERS.values() if name in _arguments(t)]
            if trainer.name not in able:
                raise ValueError(f"{name} is for runs of {' or '.join(able)}, got {value}")
        network, run = trainer.load(self.folder)
        images = trainer.sample(network, run, self.n, seed=self.seed, **own)
        if kind == ".npy":
            with replacing(self.out) as temporary, temporary.open("wb") as file:
                np.save(file, images.numpy())
        else:
            columns, names = grid_columns(self.n, run.classes)
            title = f"{self.folder.resolve().name}: {trainer.name}, seed {self.seed}"
            plots.save_grid(self.out, images, columns=columns, title=title, names=names)
        sys.stdout.write(f"{self.out}\n")


@dataclass(frozen=True)
class Verify:
    """Run every GPU kernel here and compare it with float64; `fewstep verify --help` says more."""

    def execute(self) -> None:
        raise SystemExit(report.main([]))


def parse(arguments: list[str]) -> Command:
    """The command that the arguments ask for.

    Raises:
        ValueError: the arguments do not fit; the message is one line.
        SystemExit: after --help.
    """
    for name in ("--data", "--out"):
        if f"{name}=" in arguments or (name, "") in itertools.pairwise(arguments):
            raise ValueError(f"{name[2:]}: must not be empty, got ''")
    methods: Any = Union[tuple(_subcommands(arguments))]  # noqa: UP007
    train = make_dataclass(
        "Train",
        [("method", methods)],
        frozen=True,
        bases=(Train,),
        namespace={"__doc__": Train.__doc__},
    )
    kinds = zip(_COMMANDS, (train, Pairs, Sample, Verify), strict=True)
    command: Any = Annotated[
        Union[tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in kinds)],  # noqa: UP007
        tyro.conf.OmitArgPrefixes,
        tyro.conf.OmitSubcommandPrefixes,
    ]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            parsed: Command = tyro.cli(
                command,
                prog="fewstep",
                description="Train few-step generators. `fewstep --version` prints the version.",
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
            return parsed
    except SystemExit as error:
        if not error.code:
            raise
        raise ValueError(_one_line(box.getvalue(), arguments)) from error


def _one_line(box: str, arguments: list[str]) -> str:
    """What tyro's box says is wrong, without its helps, and the command that shows the options."""
    text = "\n".join(line.strip("│ ") for line in box.splitlines() if line[:1] not in "╭╰")
    parts = re.split("[─-]{10,}", text)
    says = []
    # Without a frame, where the terminal has ASCII alone, the title stands above a line.
    for part in parts[not box.startswith("╭") :]:
        line = " ".join(part.split()).rstrip(" .")
        if line.startswith("Perhaps you meant"):
            names = dict.fromkeys(re.findall(r"--[\w-]+", line.replace("--help", "")))
            line = f"perhaps {' or '.join([*names][:3])}"
        if not line.startswith(("Argument helptext", "For full helptext")):
            says.append(line.removeprefix("Error parsing "))
    words = itertools.takewhile(lambda word: not word.startswith("-"), arguments[:2])
    known = [word for word in words if word in {*_COMMANDS, *TRAINERS}]
    return f"{'; '.join(says)}; see {' '.join(['fewstep', *known, '--help'])}"


def _subcommands(arguments: list[str]) -> Iterable[Any]:
    """A subcommand for each method. Defaults depend on some arguments, which are looked at first:
    the data set has its preset, a transformer its learning rate, and a run that is resumed has its
    own settings."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="?")
    parser.add_argument("--out", nargs="?")
    parser.add_argument("--network", nargs="?")
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(arguments)
    for trainer in TRAINERS.values():
        if arguments[:2] == ["train", trainer.name] and known.resume and known.out:
            form = _form(trainer, trainer.read_run(Path(known.out)).config)
        elif known.data:
            form = _form(trainer, _for_network(trainer.preset(known.data), known.network))
        else:
            form = _form(trainer, trainer.preset("mnist5k"), required=("data",))
        yield Annotated[form, tyro.conf.subcommand(trainer.name, description=trainer.summary)]


def _for_network(config: RunConfig, network: str | None) -> RunConfig:
    """The settings with the learning rate of the released generators, for a transformer."""
    if network in (None, "mlp") or str(network).startswith("conv"):
        return config
    return dataclasses.replace(config, lr=min(config.lr, _LR_OF_TRANSFORMERS))


def _form(
    trainer: Trainer[Any, Any], config: RunConfig, *, required: tuple[str, ...] = ()
) -> type[TrainMethod]:
    """The options of a method as nested dataclasses, one for each group of the help."""
    losses = nested(trainer.config)
    names = [f.name for f in dataclasses.fields(config) if f.name not in losses]
    shared = [name for name in names if name in _OF_THE_RUN]
    run = _group("run", config, shared, required=required, bases=(Folder,))
    training = _group("training", config, [name for name in names if name not in shared])
    members = [
        ("run", _explained(run, "Where the run is, and what it trains on.")),
        (
            "training",
            _explained(
                training, "How long it trains, and which networks. Defaults are those for --data."
            ),
        ),
    ]
    for name, kind in losses.items():
        label, loss = _label(trainer, name), getattr(config, name)
        group = _group(label, loss, [f.name for f in dataclasses.fields(loss)])
        room = ".".join(kind.__module__.split(".")[:2])
        members.append((label, _explained(group, f"The loss, `{room}.{kind.__name__}`.")))
    namespace = {"__doc__": trainer.summary, "trainer": trainer, "defaults": config}
    form: type[TrainMethod] = make_dataclass(
        trainer.name, members, bases=(TrainMethod,), frozen=True, namespace=namespace
    )
    return form


def _group(
    label: str,
    values: Any,
    names: Iterable[str],
    *,
    required: tuple[str, ...] = (),
    bases: tuple[type, ...] = (),
) -> type:
    """A dataclass of some fields of another one, with its values as defaults."""
    kind = type(values)
    hints, texts = typing.get_type_hints(kind), _help(kind)

    def explained(name: str) -> Any:
        default = getattr(values, name)
        # What is on by default gets the flag `--no-NAME`, so the docs of such a field are a noun.
        text = "without " * (default is True) + texts.get(name, "")
        hint = (
            "(default: with)" if default is True else "(default: none)" if default == "" else None
        )
        return tyro.conf.arg(help=text, help_behavior_hint=hint)

    entries: list[Any] = [
        (
            name,
            Annotated[hints[name], explained(name)],
            *(() if name in required else [field(default=getattr(values, name))]),
        )
        for name in names
        if hints[name] not in _NOT_OPTIONS
    ]
    return make_dataclass(label, entries, bases=bases, frozen=True, kw_only=True)


def _help(kind: type) -> dict[str, str]:
    """The docs of a class's attributes, its own before those of its bases."""
    docs = (docstring_parser.parse(one.__doc__ or "").params for one in reversed(kind.__mro__))
    return {
        entry.arg_name: " ".join((entry.description or "").split())
        for entry in itertools.chain.from_iterable(docs)
    }


def _explained(group: type, text: str) -> Any:
    return Annotated[group, tyro.conf.arg(help=text)]


def _label(trainer: Trainer[Any, Any], name: str) -> str:
    """The group of a nested field's options, "loss" if it is the only one."""
    return "loss" if len(nested(trainer.config)) == 1 else name


def _arguments(trainer: Trainer[Any, Any]) -> Iterable[str]:
    return inspect.signature(trainer.sample).parameters
