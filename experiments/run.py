"""Runs a study: `python -m experiments.run CONFIG [--overrides]`."""

import sys
from collections.abc import Sequence

from experiments import startup


def main(args: Sequence[str] | None = None) -> int:
    """Runs the study that a command line names; see :func:`experiments.command_line.main`.

    Args:
      args: In place of `sys.argv[1:]`.

    Returns:
      The exit status.
    """

    def imported() -> int:
        from experiments import command_line  # takes seconds

        return command_line.main(args)

    with startup.preemptible():
        return startup.run("experiments.run", imported)


if __name__ == "__main__":
    sys.exit(main())
