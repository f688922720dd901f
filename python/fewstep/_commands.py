"""The commands of `fewstep`, their options, and what they do."""

from __future__ import annotations

import argparse
import contextlib
import io
import math
import re
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from fewstep import plots, train, train_reflow
from fewstep.metrics import format_report


@dataclass(frozen=True)
class Train:
    """Train a one-step generator, then compare its samples with the real images.

    Attributes:
        method: the training method.
        out: folder of the run.
        config: the defaults are those for the data set; with --resume, the run's own.
        resume: continue the run in that folder.
        overwrite: replace the run in that folder.
    """

    method: tyro.conf.Positional[Literal["wflow", "reflow"]]
    out: Path
    config: train.TrainConfig
    resume: bool = False
    overwrite: bool = False

    def run(self) -> None:
        result = train.train(self.config, self.out, resume=self.resume, overwrite=self.overwrite)
        sys.stdout.write(f"\n{format_report(result.rows)}\n\n{result.picture}\n")


@dataclass(frozen=True)
class TrainReflow:
    """Train a teacher and few-step students of it, with marginal alignment and without.

    Attributes:
        method: the training method.
        out: folder of the run.
        config: the defaults are those for the data set; with --resume, the run's own.
        resume: continue the run in that folder.
        overwrite: replace the run in that folder.
    """

    method: tyro.conf.Positional[Literal["reflow"]]
    out: Path
    config: train_reflow.ReflowConfig
    resume: bool = False
    overwrite: bool = False

    def run(self) -> None:
        result = train_reflow.train(
            self.config, self.out, resume=self.resume, overwrite=self.overwrite
        )
        sys.stdout.write(f"\n{result.table}\n\n{result.picture}\n")


@dataclass(frozen=True)
class Sample:
    """Draw samples from a trained generator into a PNG, one class per column.

    Attributes:
        folder: of the run.
        out: the PNG.
        n: number of samples.
        seed: of the noise.
    """

    folder: tyro.conf.Positional[Path]
    out: Path
    n: int = 64
    seed: int = 0

    def run(self) -> None:
        if self.n < 1:
            raise ValueError(f"n must be at least 1, got {self.n}")
        if self.seed < 0:
            raise ValueError(f"seed must be at least 0, got {self.seed}")
        if self.out.suffix.lower() != ".png":
            raise ValueError(f"out must be a .png file, got {self.out}")
        columns = math.ceil(math.sqrt(self.n))
        if train.method_of(self.folder) == "reflow":
            student, flow = train_reflow.load_student(self.folder)
            images = train_reflow.sample(student, flow, self.n, seed=self.seed)
        else:
            generator = train.load_generator(self.folder)
            images = train.sample(generator, self.n, seed=self.seed)
            columns = generator.classes or columns
        plots.save_grid(self.out, images, columns=min(self.n, columns))
        sys.stdout.write(f"{self.out}\n")


def parse(arguments: list[str]) -> Train | TrainReflow | Sample:
    """The command that the arguments ask for.

    Raises:
        ValueError: arguments that do not fit, in one line.
        SystemExit: after --help.
    """
    kind: Any = TrainReflow if "reflow" in arguments[1:] else Train
    command = Annotated[
        Annotated[kind, tyro.conf.subcommand("train", default=_train_defaults(arguments))]
        | Annotated[Sample, tyro.conf.subcommand("sample")],
        tyro.conf.OmitArgPrefixes,
    ]
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(
                command, prog="fewstep", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
            )
    except SystemExit as error:
        if not error.code:
            raise
        title, *lines = [line.strip("│╭╮╰╯─ ") for line in box.getvalue().splitlines()]
        body = re.sub(r"Error parsing \S+: ", "", " ".join(filter(None, lines)))
        raise ValueError(f"{title}: {body}") from error


def _train_defaults(arguments: list[str]) -> Train | TrainReflow:
    """The options' defaults depend on three of them, which are looked at first."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--data", nargs="?")
    parser.add_argument("--out", nargs="?")
    parser.add_argument("--resume", action="store_true")
    known, _ = parser.parse_known_args(arguments)
    if "reflow" in arguments[1:]:
        reflow = train_reflow.preset(known.data or "digits")
        if known.resume and known.out:
            reflow = train_reflow.read_run(Path(known.out))[0]
        elif not known.data:
            reflow = replace(reflow, data=tyro.MISSING)
        return TrainReflow(tyro.MISSING, tyro.MISSING, reflow)
    if arguments[:1] == ["train"] and known.resume and known.out:
        config = train.read_run(Path(known.out)).config
    elif known.data:
        config = train.preset(known.data)
    else:
        config = replace(train.preset("mnist5k"), data=tyro.MISSING)
    return Train(tyro.MISSING, tyro.MISSING, config)
