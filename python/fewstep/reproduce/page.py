"""The page that shows each experiment beside its paper's claim."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from fewstep._files import replacing
from fewstep.reproduce.experiment import PICTURE, Result

_HEAD = """# Reproduction

The small experiments of the papers behind fewstep's methods, each beside what its paper says.
{command} makes this page, the tables and the pictures, and continues where it was stopped.
`fewstep reproduce NAME` runs one experiment into `{folder}`. `--fast` takes smaller settings, of
seconds.

Numbers are means over seeds ± half of the 95 % interval by Student's t. The verdict follows from
the checks below each table. It is "agrees" if all of them hold, "agrees in direction" if only
strict ones fail, and "does not show here" otherwise. A comparison of two rows is paired by seed,
and holds if the interval of the difference excludes 0. Times are those of a seed on {cores} of a
shared machine.
"""


def write(results: Sequence[Result], path: Path) -> None:
    """Write the page, and its pictures in a folder of its name."""
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    rows = ["| experiment | what the paper says | verdict |", "|---|---|---|"]
    parts = []
    for result in results:
        one = result.experiment
        with replacing(pictures / f"{one.name}.png") as temporary:
            shutil.copyfile(result.folder / PICTURE, temporary)
        claim = _escaped(one.claim, cell=True)
        rows.append(f"| [{one.name}](#{one.name}) | {claim} | **{result.verdict}** |")
        parts.append(_part(result, f"{pictures.name}/{one.name}.png"))
    fast = " --fast" * results[0].fast
    head = _HEAD.format(
        command=f"`fewstep reproduce all{fast}`",
        folder=results[0].folder.parent / "NAME",
        cores="one thread"
        if torch.get_num_threads() == 1
        else f"{torch.get_num_threads()} threads",
    )
    with replacing(path) as temporary:
        temporary.write_text("\n".join([head, *rows, "", *parts]), encoding="utf-8")


def _part(result: Result, picture: str) -> str:
    one = result.experiment
    settings = dataclasses.asdict(one.fast if result.fast else one.full)
    values = ", ".join(f"{name} {_plain(value)}" for name, value in settings.items())
    seconds = max(result.seconds)
    texts = [
        f"## {one.name}",
        f"**The paper** ({one.source}): {_escaped(one.claim)}",
        f"**Here**: {_escaped(one.setting)} Settings: {values}; {len(result.seconds)} seeds of"
        f" up to {seconds:.0f} s.",
        f"**Verdict: {result.verdict}.**" + f" {_escaped(one.remark)}" * bool(one.remark),
        f"![{one.name}]({picture})",
        table_of(result).rstrip(),
    ]
    return "\n\n".join(texts) + "\n"


def table_of(result: Result) -> str:
    """The table in Markdown, what its columns are, and the checks."""
    table, one = result.table, result.experiment
    lines = [
        " | ".join(["", *table.columns]) + " |",
        "|---|" + "---:|" * len(table.columns),
    ]
    for row, own in table.outcomes[0].rows.items():
        cells = (str(table[row, column]) if column in own else "" for column in table.columns)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines[0] = "|" + lines[0]
    means = "; ".join(f"{name}: {_escaped(text)}" for name, text in one.columns.items())
    lines += ["", f"Columns are {means}.", "", "| check | numbers | holds |", "|---|---|---|"]
    for check in result.checks:
        strict = " (strict)" * check.strict
        holds = "yes" if check.holds else "no"
        says, found = (_escaped(text, cell=True) for text in (check.says, check.found))
        lines.append(f"| {says}{strict} | {found} | {holds} |")
    return "\n".join(lines) + "\n"


def _escaped(text: str, *, cell: bool = False) -> str:
    """Text without what Markdown takes for a tag, or in a table for the end of a cell."""
    text = text.replace("<", "&lt;")
    return text.replace("|", "\\|") if cell else text


def _plain(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)
