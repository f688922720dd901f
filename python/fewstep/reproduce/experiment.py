"""What an experiment is, and how its numbers become a verdict."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.figure import Figure
    from torch import Tensor

S = TypeVar("S")  # the settings of an experiment, a frozen dataclass
PICTURE = "figure.png"  # in the folder of an experiment
AGREES, DIRECTION, NOT_HERE = "agrees", "agrees in direction", "does not show here"


@dataclass(frozen=True)
class Outcome:
    """What one seed gives.

    Attributes:
        rows: numbers by row and column of the table. All seeds have the same rows and columns.
        arrays: tensors by name, for the picture.
    """

    rows: Mapping[str, Mapping[str, float]]
    arrays: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: mean over seeds.
        half: half of the 95 % interval of the mean by Student's t.
    """

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        """The digits that the interval leaves, and three where it has none."""
        if not math.isfinite(self.half) or self.half <= 1e-4 * abs(self.mean) or self.mean == 0:
            return f"{self.mean:.3g}"
        size = math.floor(math.log10(max(abs(self.mean), self.half)))
        places = max(0, min(1 - math.floor(math.log10(self.half)), 3 - size))
        if not 1e-4 <= abs(self.mean) < 1e5:
            return f"{self.mean:.2e} ± {self.half:.1e}"
        return f"{self.mean:.{places}f} ± {self.half:.{places}f}"


@dataclass(frozen=True)
class Table:
    """The numbers of all seeds.

    >>> table = Table([Outcome({"a": {"x": v}, "b": {"x": 1.0}}) for v in (2.0, 3.0, 4.0)])
    >>> table["a", "x"].mean, round(table["a", "x"].half, 3)
    (3.0, 2.484)
    >>> table.difference("a", "b", "x").mean
    2.0
    """

    outcomes: Sequence[Outcome]

    @property
    def rows(self) -> list[str]:
        return list(self.outcomes[0].rows)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(c for row in self.outcomes[0].rows.values() for c in row))

    def values(self, row: str, column: str) -> list[float]:
        return [outcome.rows[row][column] for outcome in self.outcomes]

    def __getitem__(self, at: tuple[str, str]) -> Estimate:
        return estimate(self.values(*at))

    def difference(self, row: str, other: str, column: str) -> Estimate:
        """The first row less the other, paired by seed."""
        pairs = zip(self.values(row, column), self.values(other, column), strict=True)
        return estimate([a - b for a, b in pairs])


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of a number of each seed, and its interval."""
    stats = importlib.import_module("scipy.stats")  # comes with POT

    n, mean = len(values), math.fsum(values) / len(values)
    if n < 2:
        return Estimate(mean, math.inf)
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1)
    return Estimate(mean, float(stats.t.ppf(0.975, n - 1)) * math.sqrt(variance / n))


@dataclass(frozen=True)
class Check:
    """A part of the claim, as a statement on the numbers.

    Attributes:
        says: statement, for a reader.
        holds: whether the numbers bear it out.
        found: numbers that it was judged by.
        strict: whether the verdict "agrees" alone needs it, and "agrees in direction" does not.
    """

    says: str
    holds: bool
    found: str
    strict: bool = False


def below(
    table: Table, row: str, other: str, column: str, says: str, *, strict: bool = False
) -> Check:
    """That a row's number is smaller than another's, by more than the interval over seeds."""
    apart = table.difference(row, other, column)
    return Check(says, apart.high < 0, f"{column}: difference {apart}", strict)


def verdict(checks: Sequence[Check]) -> str:
    """`agrees` if every check holds, `agrees in direction` if those that are not strict do."""
    if all(check.holds for check in checks):
        return AGREES
    return DIRECTION if all(check.holds or check.strict for check in checks) else NOT_HERE


@dataclass(frozen=True)
class Experiment(Generic[S]):
    """A paper's claim, and how it is tried.

    Attributes:
        name: name in `fewstep reproduce NAME`.
        claim: what the paper says.
        source: paper and place in it.
        setting: what is done, in a few sentences.
        full: settings, a frozen dataclass.
        fast: smaller settings, for tests.
        run: function of the settings and a seed. torch's generator starts from the seed.
        check: function that judges the table. Its checks are the rule of the verdict.
        draw: function that draws into a figure what the table and the arrays of the first seed say.
        columns: meaning of each column of the table.
        remark: what a reader should know of the verdict, such as why a claim does not show.
        size: width and height of the figure in inches.
    """

    name: str
    claim: str
    source: str
    setting: str
    full: S
    fast: S
    run: Callable[[S, int], Outcome]
    check: Callable[[Table], Sequence[Check]]
    draw: Callable[[Figure, Table, Mapping[str, Tensor]], Any]
    columns: Mapping[str, str]
    remark: str = ""
    size: tuple[float, float] = (9.0, 3.0)


@dataclass(frozen=True)
class Result:
    """What came of an experiment.

    Attributes:
        experiment: the experiment.
        fast: whether the settings were the small ones.
        table: numbers of all seeds.
        seconds: time of each seed.
        checks: parts of the claim, judged.
        verdict: "agrees", "agrees in direction" or "does not show here".
        folder: folder of the files.
    """

    experiment: Experiment[Any]
    fast: bool
    table: Table
    seconds: Sequence[float]
    checks: Sequence[Check]
    verdict: str
    folder: Path
