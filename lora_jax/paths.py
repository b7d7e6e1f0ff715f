"""Paths of leaves as strings, patterns over paths, and nearest candidates for error messages."""

import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core import meta

from lora_jax.leaves import is_quantized
from lora_jax.renamed import module_getattr

__all__ = ["FlatTree", "check_pattern", "flatten", "join", "match_patterns", "nearest", "search", "segment"]

PyTree = Any


def _is_box(node: Any) -> bool:
    return isinstance(node, nnx.Variable | meta.AxisMetadata)


def segment(key: Any) -> str:
    """Converts a key of a JAX key path to a string."""
    for attribute in ("key", "idx", "name"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def join(keys: Iterable[Any]) -> str:
    """Returns the path of a sequence of JAX key entries, joined by '/'."""
    return "/".join(map(segment, keys))


@dataclasses.dataclass(frozen=True)
class FlatTree:
    """A tree as parallel tuples of paths and leaves, with its structure.

    Attributes:
      paths: The '/'-joined path of each leaf; a box (`nnx.Variable`, Linen's `Partitioned`) adds no segment.
      leaves: The leaves, in the order of `jax.tree.leaves`; a quantized weight is one leaf.
      treedef: The structure, boxes included.
    """

    paths: tuple[str, ...]
    leaves: tuple[Any, ...]
    treedef: Any

    def unflatten(self, leaves: Iterable[Any]) -> PyTree:
        """Returns the tree with other leaves, in the same order."""
        return jax.tree_util.tree_unflatten(self.treedef, leaves)

    def as_dict(self) -> dict[str, Any]:
        """Returns `{path: leaf}`."""
        return dict(zip(self.paths, self.leaves))

    def map(self, function: Callable[[str, Any], Any]) -> PyTree:
        """Returns the tree with `function(path, leaf)` in place of each leaf."""
        return self.unflatten(function(path, leaf) for path, leaf in zip(self.paths, self.leaves))


def flatten(tree: PyTree) -> FlatTree:
    """Flattens a tree to string paths.

    Args:
      tree: Any pytree: dicts, lists, dataclasses, Equinox modules, `nnx.State`, Linen variables.

    Returns:
      The flat form. Its leaves are those of `jax.tree.leaves`, except that a quantized weight is one leaf.

    Raises:
      ValueError: Two leaves have the same printed path.

    Example:
      >>> flatten({"layer": [{"kernel": 1.0}, {"kernel": 2.0}]}).paths
      ('layer/0/kernel', 'layer/1/kernel')
    """
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: _is_box(node) or is_quantized(node))
    paths: list[str] = []
    for keys, node in nodes:
        path = join(keys)
        if _is_box(node):
            inner = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_quantized)[0]
            # A box usually has one value; if it has a tree, the paths within the tree are appended.
            tails = ["" if len(inner) == 1 else "/" + join(tail) for tail, _ in inner]
            paths.extend(path + tail for tail in tails)
        else:
            paths.append(path)
    leaves, treedef = jax.tree_util.tree_flatten(tree, is_leaf=is_quantized)
    if len(set(paths)) != len(paths):
        duplicates = sorted({path for path in paths if paths.count(path) > 1})
        raise ValueError(f"Two leaves of the tree have the same path: {', '.join(map(repr, duplicates))}.")
    return FlatTree(tuple(paths), tuple(leaves), treedef)


def search(pattern: str, path: str) -> bool:
    """Whether a regular expression matches anywhere in a path (`re.search`)."""
    return re.search(pattern, path) is not None


def check_pattern(pattern: str) -> None:
    """Raises `ValueError` unless a pattern is a regular expression."""
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"Pattern {pattern!r} is not a regular expression: {error}.") from error


def match_patterns(
    patterns: Iterable[Any], leaves: Sequence[str], selected: Mapping[Any, Collection[str]] | None = None
) -> dict[str, Any]:
    """Assigns to each path the first pattern that matches it.

    Args:
      patterns: Regular expressions, and keys of `selected`.
      leaves: Paths.
      selected: The paths of each pattern that is not a regular expression.

    Returns:
      `{path: pattern}`, in the order of `leaves`, without paths that no pattern matches.

    Raises:
      ValueError: A pattern is not a regular expression, matches no path, or only paths that earlier patterns match.

    Example:
      >>> match_patterns(["query", "kernel"], ["query/kernel", "key/kernel", "norm/scale"])
      {'query/kernel': 'query', 'key/kernel': 'kernel'}
    """
    assigned: dict[str, str] = {}
    for pattern in patterns:
        if selected is not None and pattern in selected:
            matched = [path for path in leaves if path in selected[pattern]]
        else:
            check_pattern(pattern)
            matched = [path for path in leaves if search(pattern, path)]
        if not matched:
            raise ValueError(f"The pattern {pattern!r} matches no path of the base; {nearest(str(pattern), leaves)}.")
        fresh = [path for path in matched if path not in assigned]
        if not fresh:
            earlier = sorted({assigned[path] for path in matched})
            raise ValueError(
                f"The pattern {pattern!r} is fully shadowed: the {len(matched)} paths it matches ({matched[0]!r}, …) "
                f"are matched by {', '.join(map(repr, earlier))} before it. The first match wins: move the pattern up."
            )
        assigned.update(dict.fromkeys(fresh, pattern))
    return {path: assigned[path] for path in leaves if path in assigned}


def nearest(name: str, candidates: Sequence[str], limit: int = 3) -> str:
    """Returns the candidates most similar to a name, as the end of an error message.

    Example:
      >>> nearest("atention/kernel", ["attention/kernel", "mlp/bias"], limit=1)
      "nearest: 'attention/kernel'"
    """
    if not candidates:
        return "there are none"
    words = re.sub(r"[^\w/]+", " ", name)

    def similarity(candidate: str) -> float:
        return difflib.SequenceMatcher(None, words, candidate, autojunk=False).ratio()

    best = sorted(candidates, key=similarity, reverse=True)[:limit]
    return "nearest: " + ", ".join(map(repr, best))


__getattr__ = module_getattr(__name__, compiles="check_pattern", assigned="match_patterns")
