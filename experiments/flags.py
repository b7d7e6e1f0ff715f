"""Command-line flags from a dataclass, with tyro. The docstrings of its fields are the help."""

import dataclasses
import inspect
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Collection, Sequence
from typing import Annotated, Any, TypeVar

import docstring_parser
import tyro

C = TypeVar("C")


def parse(defaults: C, program: str, args: Sequence[str] | None = None, description: str | None = None) -> C:
    """Parses a command line into a config.

    A flag that takes several values may be repeated, as in `--data a b` or `--data a --data b`.

    Args:
      defaults: A dataclass instance; each field has a docstring.
      program: The name of the command, for the usage line.
      args: Arguments; None uses `sys.argv[1:]`.
      description: The first paragraph of the help; None uses the docstring of the dataclass.

    Returns:
      `defaults` with the fields that the command line sets.

    Raises:
      SystemExit: Status 0 after --help, 2 if the flags do not parse.
    """
    kind = type(defaults)
    _document(kind)
    args = _merge_repeated(sys.argv[1:] if args is None else args, _of_several_values(kind))
    if "--help" in args or "-h" in args:  # tyro would print each paragraph of a description as one line
        print(reflowed(inspect.cleandoc(description or kind.__doc__ or ""), shutil.get_terminal_size().columns) + "\n")
    return tyro.cli(kind, default=defaults, prog=program, args=args, description="")


def reflowed(text: str, width: int = sys.maxsize) -> str:
    """Wraps the paragraphs of a text to a width. Indented lines, such as tables, are not changed.

    Example:
      >>> reflowed("A sentence that\\ngoes on.\\n\\n  a  table\\n")
      'A sentence that goes on.\\n\\n  a  table'
    """
    paragraphs = re.split(r"\n\s*\n", text.strip("\n"))
    return "\n\n".join(
        part.rstrip()
        if part.startswith(" ")
        else textwrap.fill(" ".join(part.split()), width, break_long_words=False, break_on_hyphens=False)
        for part in paragraphs
        if part.strip()
    )


def _of_several_values(kind: type, prefix: str = "--") -> set[str]:
    """Returns the flags whose fields are tuples of any length."""
    flags = set()
    for name, hint in typing.get_type_hints(kind).items():
        flag = prefix + name.strip("_").replace("_", "-")
        if dataclasses.is_dataclass(hint):
            flags |= _of_several_values(typing.cast(type, hint), f"{flag}.")
        elif any(Ellipsis in typing.get_args(option) for option in (hint, *typing.get_args(hint))):
            flags.add(flag)
    return flags


def _merge_repeated(args: Sequence[str], flags: Collection[str]) -> list[str]:
    """Moves all values of a repeated flag behind its first occurrence."""
    groups: list[list[str]] = [[]]
    first: dict[str, list[str]] = {}
    group = groups[0]
    for arg in args:
        flag, equals, value = arg.partition("=")
        flag = flag.replace("_", "-")
        if flag in first:
            group = first[flag]
        elif arg.startswith("--"):
            group = [flag if flag in flags else arg]
            groups.append(group)
        else:
            group.append(arg)
            continue
        if flag in flags:
            first[flag] = group
            group.extend([value] if equals else [])
    return [arg for group in groups for arg in group]


def _document(kind: type) -> None:
    """Sets the help of each field, also in nested dataclasses: tyro itself would keep the line breaks of the source."""
    hints = typing.get_type_hints(kind)
    for base in kind.__mro__:
        if not dataclasses.is_dataclass(base):
            continue
        texts = {entry.arg_name: entry.description for entry in docstring_parser.parse_from_object(base).params}
        fields = {field.name for field in dataclasses.fields(base)}  # without class variables
        for name, annotation in inspect.get_annotations(base).items():
            text = texts.get(name)
            if name in fields and text is not None and not _has_help(annotation):
                argument = tyro.conf.arg(help=reflowed(inspect.cleandoc(text)), help_behavior_hint=_default)
                base.__annotations__[name] = Annotated[annotation, argument]
            if dataclasses.is_dataclass(nested := hints.get(name)):
                _document(typing.cast(type, nested))


def _default(value: str) -> str:
    """Formats a default for the help; an empty list has no text."""
    return f"(default: {value})" if value else ""


def _has_help(annotation: Any) -> bool:
    return any(getattr(extra, "help", None) for extra in getattr(annotation, "__metadata__", ()))
