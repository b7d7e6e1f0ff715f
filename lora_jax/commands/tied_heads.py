"""Heads that a checkpoint does not store because they are tied to an embedding, and what an adapter does to them."""

import collections
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lora_jax.commands.factor_shapes import Shape
from lora_jax.commands.leaves import Kind
from lora_jax.commands.module_kinds import last_segment
from lora_jax.peft import keys, ties
from lora_jax.peft.adapter_tensors import AdapterTensors
from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key


class UntiedHead(NamedTuple):
    """A head that an adapter makes a weight of its own.

    Attributes:
      table: The embedding that it was tied to.
      reason: Why the two are different weights.
      kind: The kind of its module.
    """

    table: str
    reason: str
    kind: Kind


def find_tied(
    sizes: Mapping[Key, Shape],
    in_files: Mapping[str, str],
    shapes: Mapping[str, Shape],
    kinds: Mapping[str, Kind],
    prefix: str,
) -> dict[str, str]:
    """Finds weights of an adapter that a checkpoint stores only as an embedding, by shape.

    Args:
      sizes: The shapes of the adapter's tensors.
      in_files: The names of the checkpoint's tensors, by name without prefix.
      shapes: The shapes of the checkpoint's tensors.
      kinds: The known kinds of modules, by tensor.
      prefix: A prefix of some names.

    Returns:
      The heads, by embedding.
    """
    tied: dict[str, str] = {}
    missing: dict[str, list[Shape]] = collections.defaultdict(list)
    for key, shape in sizes.items():
        name = f"{key.module.removeprefix(prefix)}.weight"
        is_weight = key.part in ("a", "b") or key.name == f"{key.module}.weight"
        if name not in in_files and not key.embedding and is_weight:
            missing[name].append(shape)
    tables: dict[Shape, list[str]] = collections.defaultdict(list)
    if missing:
        for name, shape in shapes.items():
            if kinds.get(name) == "embedding" or re.search(r"emb|wte|shared", last_segment(name)):
                tables[shape].append(name)
    for name, stored in missing.items():
        # The shape of the weight itself, or of factors (r, in) and (out, r) in either order.
        products = {(b[0], a[-1]) for a in stored for b in stored if a and b}
        candidates = [table for shape in tables if shape in stored or shape in products for table in tables[shape]]
        chosen = [x for x in candidates if kinds.get(x) == "embedding"] or candidates
        if len(chosen) == 1 and not re.search(r"\.\d+\.", name):
            tied[chosen[0]] = name
    return tied


def split_untied(
    heads: Mapping[str, str], parsed: Iterable[Key], config: Config, tensors: AdapterTensors, prefix: str
) -> tuple[dict[str, tuple[str, ...]], dict[str, UntiedHead]]:
    """Splits tied heads into those that an adapter leaves tied, and those that it unties.

    Args:
      heads: The heads that the checkpoint does not store, by embedding.
      parsed: The adapter's keys.
      config: The adapter's config.
      tensors: The adapter's open tensors.
      prefix: A prefix of some names.

    Returns:
      By embedding, the heads that remain the same weight; and by head, the untied ones.
    """
    by_module: dict[str, list[Key]] = collections.defaultdict(list)
    for key in parsed:
        by_module[key.module.removeprefix(prefix)].append(key)
    tied: dict[str, tuple[str, ...]] = {}
    untied: dict[str, UntiedHead] = {}
    for table, head in heads.items():
        modules = [keys.split_name(name.removeprefix(prefix))[0] for name in (table, head)]
        table_keys, head_keys = (by_module.get(module, []) for module in modules)
        if reason := ties.untied_reason(table_keys, head_keys, config, tensors):
            has_rows = any(key.part == "rows" for key in head_keys)
            untied[head] = UntiedHead(table, reason, "embedding" if has_rows else "linear")
        elif table_keys or head_keys:
            tied[table] = (head,)
    return tied, untied
