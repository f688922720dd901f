"""Run experiments into folders. A seed that is done stays done."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from fewstep import __version__
from fewstep._checks import count
from fewstep._files import one_writer, read_tensors, replacing, write_tensors
from fewstep.reproduce import EXPERIMENTS, find, page
from fewstep.reproduce.experiment import PICTURE, Experiment, Outcome, Result, Table, verdict

_LEAST_SEEDS = 3


def reproduce(
    name: str, *, fast: bool = False, out: Path | None = None, seeds: int = _LEAST_SEEDS
) -> list[Result]:
    """Run an experiment, or all of them, and write what came of it.

    Each has a folder `out/NAME` with `table.csv`, `table.md`, `figure.png`, `settings.json` and
    `verdict.json`, and `seeds/`, where a file for each seed is whole or absent. Files of the same
    settings and version are kept, so that a run that was stopped goes on where it was. `all` also
    writes a page: docs/reproduction.md, or with small settings or a folder `out/reproduction.md`.

    Args:
        name (str): name of an experiment, or "all".
        fast (bool): small settings, of seconds.
        out (Path | None): folder. None takes runs/reproduce, or runs/reproduce/fast.
        seeds (int): number of seeds, at least 3.

    Returns:
        list: a `Result` for each experiment.

    Raises:
        ValueError: the name is unknown, there are fewer seeds, or another process has the folder.
        ModuleNotFoundError: a package of the extra "train" is missing.
    """
    experiments = [find(each) for each in (EXPERIMENTS if name == "all" else (name,))]
    seeds = count("reproduce", "seeds", seeds, _LEAST_SEEDS)
    folder = out or (Path("runs/reproduce/fast") if fast else Path("runs/reproduce"))
    results = [_run(one, folder / one.name, fast=fast, seeds=seeds) for one in experiments]
    if name == "all":
        own = fast or out is not None
        page.write(results, (folder if own else Path("docs")) / "reproduction.md")
    return results


def _run(experiment: Experiment[Any], folder: Path, *, fast: bool, seeds: int) -> Result:
    settings = experiment.fast if fast else experiment.full
    with one_writer(folder):
        (folder / "seeds").mkdir(exist_ok=True)
        own = {"fewstep": __version__, "settings": dataclasses.asdict(settings)}
        described = json.dumps(own)
        outcomes, seconds = [], []
        for seed in range(seeds):
            path = folder / "seeds" / f"{seed}.safetensors"
            if (kept := _kept(path, described)) is None:
                start = time.perf_counter()
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    outcome = experiment.run(settings, seed)
                kept = outcome, time.perf_counter() - start
                _keep(path, outcome, described, kept[1])
            outcomes.append(kept[0])
            seconds.append(kept[1])
            sys.stderr.write(f"{experiment.name}, seed {seed}: {kept[1]:.0f} s\n")
        table = Table(outcomes)
        checks = experiment.check(table)
        result = Result(experiment, fast, table, seconds, checks, verdict(checks), folder)
        _write(folder / "settings.json", json.dumps(own | {"seeds": seeds}, indent=2) + "\n")
        _write(folder / "table.csv", _csv(table))
        _write(folder / "table.md", page.table_of(result))
        judged = [dataclasses.asdict(check) for check in checks]
        _write(
            folder / "verdict.json",
            json.dumps({"verdict": result.verdict, "checks": judged}, indent=2) + "\n",
        )
        _picture(experiment, table, folder / PICTURE)
    return result


def _kept(path: Path, described: str) -> tuple[Outcome, float] | None:
    """The outcome in a file of these settings; None where there is none, or a damaged one."""
    try:
        arrays, metadata = read_tensors(path)
        if metadata["run"] != described:
            return None
        return Outcome(json.loads(metadata["rows"]), arrays), float(metadata["seconds"])
    except (FileNotFoundError, KeyError, ValueError):
        return None


def _keep(path: Path, outcome: Outcome, described: str, seconds: float) -> None:
    arrays = {name: t.detach().contiguous() for name, t in outcome.arrays.items()}
    rows = json.dumps(outcome.rows)
    write_tensors(path, arrays, {"run": described, "rows": rows, "seconds": repr(seconds)})


def _write(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _csv(table: Table) -> str:
    box = io.StringIO()
    writer = csv.writer(box, lineterminator="\n")
    seeds = [f"seed {i}" for i in range(len(table.outcomes))]
    writer.writerow(["row", "column", "mean", "half of the 95 % interval", *seeds])
    for row, numbers in table.outcomes[0].rows.items():
        for column in numbers:
            value = table[row, column]
            writer.writerow([row, column, value.mean, value.half, *table.values(row, column)])
    return box.getvalue()


def _picture(experiment: Experiment[Any], table: Table, path: Path) -> None:
    """A PNG of 64 colours, which keeps it small."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    with rc_context({"font.size": 8.0}):
        figure = Figure(experiment.size, dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        own = table.outcomes[0].arrays  # which a file holds in the order of the alphabet
        ordered = {name: own[name] for name in (*table.rows, *own) if name in own}
        experiment.draw(figure, table, ordered)
        box = io.BytesIO()
        figure.savefig(box, format="png")
    with replacing(path) as temporary, Image.open(box) as picture:
        picture.convert("RGB").quantize(64).save(temporary, format="png", optimize=True)
