"""Templates of paths and names with placeholders, and the notation of layouts."""

import functools
import itertools
import re
from collections.abc import Iterator, Mapping

_AXIS = re.compile(r"\(([\w ]+)\)|(\w+)")
_PLACEHOLDER = re.compile(r"\{(\w+)(?:=([^{}]*))?\}")

Axes = tuple[tuple[str, ...], ...]
"""The labels of each axis of an array."""


def placeholders(template: str) -> dict[str, tuple[str, ...]]:
    """Returns the placeholders of a template with their words; those for numbers have none.

    Example:
      >>> placeholders("h.{layer}.{part=q|k}.weight")
      {'layer': (), 'part': ('q', 'k')}
    """
    return {m[1]: tuple(m[2].split("|")) if m[2] else () for m in _PLACEHOLDER.finditer(template)}


def fill(template: str, texts: Mapping[str, str]) -> str:
    """Replaces each placeholder by its text.

    Example:
      >>> fill("h.{layer}.weight", {"layer": "3"})
      'h.3.weight'
    """
    return _PLACEHOLDER.sub(lambda match: texts[match[1]], template)


@functools.cache
def path_pattern(path: str) -> re.Pattern:
    """Compiles a path template to a regular expression with a group for each placeholder.

    A segment that is a placeholder may be absent from the path.
    """
    patterns = []
    for segment in path.split("/"):
        texts = [
            f"(?P<{match[1]}>{'|'.join(map(re.escape, match[2].split('|'))) if match[2] else '[0-9]+'})"
            if match
            else re.escape(text)
            for text, match in _split(segment)
        ]
        pattern = "".join(texts) + "/"
        patterns.append(f"(?:{pattern})?" if _PLACEHOLDER.fullmatch(segment) else pattern)
    return re.compile("".join(patterns).removesuffix("/"))


@functools.cache
def name_pattern(name: str, words: tuple[tuple[str, tuple[str, ...]], ...]) -> re.Pattern:
    """Compiles a name template to a regular expression, given the words of its placeholders."""
    choices = dict(words)
    texts = [
        (f"(?:{'|'.join(map(re.escape, choices[match[1]]))})" if choices.get(match[1]) else "[0-9]+")
        if match
        else re.escape(text)
        for text, match in _split(name)
    ]
    return re.compile("".join(texts))


def _split(template: str) -> Iterator[tuple[str, re.Match | None]]:
    """Yields plain text and placeholders, in order."""
    end = 0
    for match in _PLACEHOLDER.finditer(template):
        yield template[end : match.start()], None
        yield match[0], match
        end = match.end()
    yield template[end:], None


@functools.cache
def parse_layout(layout: str) -> tuple[Axes, Axes]:
    """Returns the labels of each axis on both sides of a layout.

    Raises:
      ValueError: The layout is malformed.

    Example:
      >>> parse_layout("in heads width -> (heads width) in")
      ((('in',), ('heads',), ('width',)), (('heads', 'width'), ('in',)))
    """
    sides = layout.split("->")
    if len(sides) != 2:
        raise ValueError(f"The layout {layout!r} is not of the form 'in out -> out in'.")
    left, right = (
        tuple(tuple(match[1].split() if match[1] is not None else [match[2]]) for match in _AXIS.finditer(side))
        for side in sides
    )
    for side, text in zip((left, right), sides):
        labels = list(itertools.chain(*side))
        if len(set(labels)) != len(labels) or _AXIS.sub("", text).strip():
            raise ValueError(f"The layout {layout!r} is malformed at {text.strip()!r}.")
    return left, right


def layout_labels(layout: str) -> tuple[list[str], list[str]]:
    """Returns all labels on both sides of a layout; none for an empty one."""
    if not layout:
        return [], []
    left, right = parse_layout(layout)
    return list(itertools.chain(*left)), list(itertools.chain(*right))
