"""`fewstep.verification.worker` with the interpreter as the device."""

from __future__ import annotations

import importlib.util
import os

os.environ["TRITON_INTERPRET"] = "0"

from . import project, sim


def main() -> None:
    sim.options_of_environment()
    project.use_cuda()
    if importlib.util.find_spec("triton") is not None:
        project.use_triton()
    from fewstep.verification import worker

    worker.main()


if __name__ == "__main__":
    main()
