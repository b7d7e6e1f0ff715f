"""The command line of `python -m experiments.run`: which study a name means, its flags, and how it ends."""

import difflib
import importlib
import pkgutil
import shutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import jax

from experiments import configs, flags, pods, startup
from experiments.errors import Preempted, UserError
from experiments.training import processes
from experiments.training.interrupt import terminable

_PROGRAM = "python -m experiments.run"
_LOST = 76
_CACHE = Path("~/.cache/lora_jax/compiled")


def main(args: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the study that it names.

    Args:
      args: In place of `sys.argv[1:]`.

    Returns:
      The exit status: 0, 2 for what the user can put right, 75 when told to end (SIGTERM), 130 when interrupted, 76
      where another process of the run has ended.
    """
    name, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    status, joined = 0, False
    try:
        module = find_config(name)
        config = flags.parse(module.DEFAULTS, f"{_PROGRAM} {name}", rest)
        keep_compiled()
        joined = getattr(config, "distributed", False)
        with processes.joined() if joined else terminable():
            importlib.import_module(module.STUDY).run(config)
    except UserError as error:
        status = _report(2, f"error: {error}")
    except BrokenPipeError:
        raise  # the standard output is the caller's
    except OSError as error:  # a full disk, a directory that may not be written
        message = f"{error.filename or 'input or output'}: {error.strerror}" if error.strerror else str(error)
        status = _report(2, f"error: {message}")
    except SystemExit as stop:  # --help, or flags that do not parse
        return stop.code if isinstance(stop.code, int) else 2
    except Preempted as error:
        status = _report(startup.PREEMPTED, f"preempted {error}; the same command resumes")
    except processes.LostProcess as error:
        status = _report(_LOST, f"error: {error}; start all of them again, the run resumes")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        status = _report(
            2,
            f"error: out of memory ({str(error).strip().splitlines()[0]}); smaller batches, more parts of the mesh or "
            "more rematerialization take less, and experiments.compile_for_pod says how much a step takes",
        )
    except KeyboardInterrupt:
        status = _report(startup.INTERRUPTED, "interrupted: the same command resumes")
    if joined and status:
        processes.end(status)
    return status


def keep_compiled() -> None:
    """Compiled programs outlive the process: in the directory that JAX is told, or in the user's cache."""
    if jax.config.jax_compilation_cache_dir is None:  # pyrefly: ignore[missing-attribute]
        jax.config.update("jax_compilation_cache_dir", str(_CACHE.expanduser()))


def _report(status: int, line: str) -> int:
    print(line, file=sys.stderr)
    return status


def usage() -> str:
    """What `--help` prints: the configs with a line each."""
    lines = [f"usage: {_PROGRAM} CONFIG [--help] [--overrides]"]
    for package, title in ((configs, "configs:"), (pods, "configs for several chips (experiments/pods/README.md):")):
        lines += ["", title]
        for name in config_names(package):
            summary = (find_config(name).__doc__ or "").strip().splitlines()[0]
            lines += textwrap.wrap(
                f"  {name:18} {summary}", shutil.get_terminal_size().columns, subsequent_indent=" " * 21
            )
    return "\n".join(lines)


def config_names(package: ModuleType) -> list[str]:
    """The modules of a package of configs, with dashes."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(package.__path__))


def find_config(name: str) -> ModuleType:
    """The module of a config, whose name is written with dashes or as the module's.

    Raises:
      UserError: There is none of that name; the message says what comes nearest.
    """
    names = {name: package for package in (configs, pods) for name in config_names(package)}
    dashed = name.replace("_", "-")
    if dashed not in names:
        near = difflib.get_close_matches(dashed, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are: {', '.join(names)}"
        raise UserError(f"unknown config {name!r}; {hint}")
    return importlib.import_module(f"{names[dashed].__name__}.{dashed.replace('-', '_')}")
