"""Runs a study: `python -m experiments.run CONFIG [--overrides]`."""

import difflib
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType

import tyro

from experiments import configs
from experiments.errors import UserError

_PROGRAM = "python -m experiments.run"
_INTERRUPTED = 130  # as the shell says it


def main(args: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the study that it names.

    Args:
      args: In place of `sys.argv[1:]`.

    Returns:
      The exit status: 0, 2 for what the user can put right, 130 when interrupted.
    """
    name, *flags = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    try:
        module = find_config(name)
        config = tyro.cli(type(module.DEFAULTS), default=module.DEFAULTS, prog=f"{_PROGRAM} {name}", args=flags)
        importlib.import_module(module.STUDY).run(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:  # a full disk, a directory that may not be written
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except SystemExit as stop:  # tyro's: --help, or flags that do not parse
        return stop.code if isinstance(stop.code, int) else 2
    except KeyboardInterrupt:
        print("interrupted: the same command resumes", file=sys.stderr)
        return _INTERRUPTED
    return 0


def usage() -> str:
    """What `--help` prints: the configs with a line each."""
    lines = [f"usage: {_PROGRAM} CONFIG [--help] [--overrides]", "", "configs:"]
    for name in config_names():
        summary = (find_config(name).__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:16} {summary}")
    return "\n".join(lines)


def config_names() -> list[str]:
    """The modules of `experiments.configs`, with dashes."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(configs.__path__))


def find_config(name: str) -> ModuleType:
    """The module of a config, whose name is written with dashes or as the module's.

    Raises:
      UserError: There is none of that name; the message says what comes nearest.
    """
    names, dashed = config_names(), name.replace("_", "-")
    if dashed not in names:
        near = difflib.get_close_matches(dashed, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(names)}"
        raise UserError(f"unknown config {name!r}; {hint}")
    return importlib.import_module(f"experiments.configs.{dashed.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
