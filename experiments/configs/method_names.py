"""Lists of methods on the command line, separated by commas."""

from collections.abc import Sequence

from tyro.constructors import PrimitiveConstructorSpec


def parse_methods(text: Sequence[str], names: Sequence[str]) -> tuple[str, ...]:
    """Parses methods that are separated by commas.

    Args:
      text: The parts of the command line.
      names: The names of all methods.

    Raises:
      ValueError: A method is unknown or repeated.
    """
    methods = tuple(part.strip() for part in ",".join(text).split(",") if part.strip())
    if unknown := [method for method in methods if method not in names]:
        raise ValueError(f"unknown method {unknown[0]!r}; expected one of {', '.join(names)}")
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"expected different methods, separated by commas, from {', '.join(names)}")
    return methods


def separated_by_commas(names: Sequence[str]) -> PrimitiveConstructorSpec[tuple[str, ...]]:
    """Returns the annotation of a field that is a tuple of methods."""
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="METHOD,METHOD",
        instance_from_str=lambda text: parse_methods(text, names),
        is_instance=lambda value: isinstance(value, tuple) and all(isinstance(part, str) for part in value),
        str_from_instance=lambda value: [",".join(value)] if value else [],
    )
