"""The command line of `python -m experiments.run`: finds a config, parses its flags, runs its study."""

import difflib
import importlib
import pkgutil
import shutil
import sys
import textwrap
import typing
from collections.abc import Sequence
from types import ModuleType

from experiments import configs, flags, pods, startup
from experiments.errors import UserError

_PROGRAM = "python -m experiments.run"
_CONFIGS = "configs, with minutes on 2 CPU cores:"
_SUMMARY = 29  # the column at which summaries begin
_DIVIDED = {"analysis": "subspaces (LoRA paper, figures 3 and 4, table 7) and dora (DoRA paper, figure 2)"}
"""Configs by former name, and those that replace them."""
_PODS = "configs for several chips (experiments/pods/README.md):"


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
    try:
        defaults = find_config(name).DEFAULTS
        _check_paper(type(defaults), rest)
        config = flags.parse(defaults, f"{_PROGRAM} {name}", rest)
        if getattr(config, "paper", None):  # the flags win over the paper's settings
            config = flags.parse(config.preset(), f"{_PROGRAM} {name}", rest)
        if hasattr(config, "CHECK"):
            importlib.import_module(config.CHECK).check(config)
        from experiments import execution  # takes seconds, since it imports JAX

        return execution.execute(config)
    except SystemExit as stop:  # from --help, or from flags that do not parse
        return stop.code if isinstance(stop.code, int) else 2
    except BaseException as error:
        status = startup.report(error)
        if status is None:
            raise
        return status


def _check_paper(kind: type, args: Sequence[str]) -> None:
    """Raises a UserError with the names of settings if `--paper` is without one."""
    hint = typing.get_type_hints(kind).get("paper")
    names = [name for option in typing.get_args(hint) for name in typing.get_args(option)]
    if names and any(arg == "--paper" and after.startswith("-") for arg, after in zip(args, [*args[1:], "--"])):
        raise UserError(f"--paper needs a name: {', '.join(names)}")


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
    dashed = name.replace("_", "-")
    for package in (configs, pods):
        if dashed.replace("-", "_") in {module.name for module in pkgutil.iter_modules(package.__path__)}:
            module = importlib.import_module(f"{package.__name__}.{dashed.replace('-', '_')}")
            if hasattr(module, "DEFAULTS"):
                return module
    if dashed in _DIVIDED:
        raise UserError(f"{name} has been divided into {_DIVIDED[dashed]}")
    names = [name for package in (configs, pods) for name in config_names(package)]
    near = difflib.get_close_matches(dashed, names, n=1)
    hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
    raise UserError(f"unknown config {name!r}; {hint}")
