"""The command `fewstep`, with its exit codes and one-line errors."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence

_OUT_OF_MEMORY = re.compile("allocate memory|out of memory")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return 0, 2 (bad input) or 130 (stopped).

    1 says that training diverged, or that a kernel did not match.

    >>> main(["sample", "no-such-run", "--out", "grid.png"])
    2
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments == ["--version"]:
            from fewstep import __version__

            sys.stdout.write(f"fewstep {__version__}\n")
            return 0
        if arguments[:1] == ["verify"]:  # needs nothing of the extra that trains
            from fewstep.verification import report

            return report.main(arguments[1:])
        from fewstep.training import commands

        commands.parse(arguments).execute()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("fewstep"):
            raise
        hint = "pip install --no-build-isolation '.[train]' in the source tree of fewstep"
        return _fail(f"{error.name} is not installed: {hint}", 2, error)
    except (OSError, TypeError, ValueError) as error:
        return _fail(str(error), 2, error)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not _OUT_OF_MEMORY.search(text):
            raise
        return _fail(f"not enough memory: {text.splitlines()[0] if text else ''}", 2, error)
    except FloatingPointError as error:
        return _fail(str(error), 1, error)
    except KeyboardInterrupt as error:
        return _fail(str(error) or "stopped", 130, error)
    return 0


def _fail(message: str, code: int, error: BaseException) -> int:
    ranks = sys.modules.get("fewstep.training.ranks")
    if ranks is None or ranks.speaks(error):
        sys.stderr.write(f"fewstep: {' '.join(message.split())}\n")
    return code
