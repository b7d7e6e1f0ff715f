"""Runs a study: `python -m experiments.run CONFIG [--overrides]`."""

import sys
from collections.abc import Sequence

from experiments import startup


def main(args: Sequence[str] | None = None) -> int:
    """Runs the study that the command line names; see :func:`experiments.command_line.main`.

    Args:
      args: Arguments; None uses `sys.argv[1:]`.

    Returns:
      The exit status.
    """

    def import_and_run() -> int:
        from experiments import command_line  # takes seconds

        return command_line.main(args)

    with startup.preemptible():
        return startup.run("experiments.run", import_and_run)


if __name__ == "__main__":
    sys.exit(main())
