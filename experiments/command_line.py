"""The command line of `python -m experiments.run`: finds a config, parses its flags, runs its study."""

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
_CONFIGS = "configs, with minutes on 2 CPU cores:"
_SUMMARY = 29  # the column at which summaries begin
_PODS = "configs for several chips (experiments/pods/README.md):"
_CACHE = Path("~/.cache/lora_jax/compiled")


def main(args: Sequence[str] | None = None) -> int:
    """Parses the command line and runs the study that it names.

    Args:
      args: Arguments; None uses `sys.argv[1:]`.

    Returns:
      The exit status: 0; 2 for an error that the user can correct; 75 after SIGTERM; 76 if another process of the run
      has ended; 130 after Ctrl-C.
    """
    name, *rest = list(sys.argv[1:] if args is None else args) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--list":
        print(listing())
        return 0
    status, joined = 0, False
    try:
        module = find_config(name)
        config = flags.parse(module.DEFAULTS, f"{_PROGRAM} {name}", rest)
        keep_compiled()
        joined = getattr(config, "distributed", False)
        with processes.distributed() if joined else terminable():
            importlib.import_module(config.STUDY).run(config)
    except UserError as error:
        status = _report(2, f"error: {error}")
    except BrokenPipeError:
        raise  # startup.run handles a closed standard output
    except OSError as error:  # such as a full disk or a read-only directory
        message = f"{error.filename or 'input or output'}: {error.strerror}" if error.strerror else str(error)
        status = _report(2, f"error: {message}")
    except SystemExit as stop:  # from --help, or from flags that do not parse
        return stop.code if isinstance(stop.code, int) else 2
    except Preempted as error:
        status = _report(startup.PREEMPTED, f"preempted {error}; the same command resumes")
    except processes.LostProcess as error:
        status = _report(_LOST, f"error: {error}; restart all processes to resume")
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        status = _report(
            2,
            f"error: out of memory ({str(error).strip().splitlines()[0]}); use a smaller batch, more devices or more "
            "rematerialization; experiments.compile_for_pod computes the memory of a step",
        )
    except KeyboardInterrupt:
        status = _report(startup.INTERRUPTED, "interrupted: the same command resumes")
    if joined and status:
        processes.end(status)
    return status


def keep_compiled() -> None:
    """Enables JAX's persistent compilation cache, in the user's cache directory unless one is configured."""
    if jax.config.jax_compilation_cache_dir is None:  # pyrefly: ignore[missing-attribute]
        jax.config.update("jax_compilation_cache_dir", str(_CACHE.expanduser()))


def _report(status: int, line: str) -> int:
    print(line, file=sys.stderr)
    return status


def usage() -> str:
    """Returns the text of `--help`: what `--list` prints, with whole summaries in several lines."""
    width = shutil.get_terminal_size().columns
    lines = [f"usage: {_PROGRAM} CONFIG [--help] [--overrides]", f"       {_PROGRAM} --list"]
    for title, entries in _entries().items():
        lines += ["", title]
        for entry in entries:
            lines += textwrap.wrap(entry, width, subsequent_indent=" " * _SUMMARY)
    return "\n".join(lines)


def listing() -> str:
    """Returns the text of `--list`: a line for each config, which fits the terminal if there is one."""
    width = shutil.get_terminal_size((sys.maxsize, 24)).columns
    lines = []
    for title, entries in _entries().items():
        lines += ["", title] if lines else [title]
        lines += [entry if len(entry) <= width else f"{entry[: width - 1]}…" for entry in entries]
    return "\n".join(lines)


def _entries() -> dict[str, list[str]]:
    """Returns for each package of configs a title, and name, minutes and summary of each config as a line."""
    groups = {}
    for package, title in ((configs, _CONFIGS), (pods, _PODS)):
        groups[title] = []
        for name in config_names(package):
            module = find_config(name)
            minutes = module.DEFAULTS.MINUTES if package is configs else None  # those of pods depend on the data
            time = "–" if minutes is None else f"{minutes} min"
            summary = (module.__doc__ or "").strip().splitlines()[0]
            groups[title].append(f"{f'  {name:18} {time:>6}':{_SUMMARY}}{summary}")
    return groups


def config_names(package: ModuleType) -> list[str]:
    """Returns the names of the configs in a package, with dashes: those of the modules that define `DEFAULTS`."""
    modules = [module.name for module in pkgutil.iter_modules(package.__path__)]
    defining = [name for name in modules if hasattr(importlib.import_module(f"{package.__name__}.{name}"), "DEFAULTS")]
    return sorted(name.replace("_", "-") for name in defining)


def find_config(name: str) -> ModuleType:
    """Imports the module of a config; its name may have dashes or underscores.

    Raises:
      UserError: No config has this name; the message has the nearest one.
    """
    names = {name: package for package in (configs, pods) for name in config_names(package)}
    dashed = name.replace("_", "-")
    if dashed not in names:
        near = difflib.get_close_matches(dashed, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
        raise UserError(f"unknown config {name!r}; {hint}")
    return importlib.import_module(f"{names[dashed].__name__}.{dashed.replace('-', '_')}")
