"""Weights that PyTorch ties: an embedding that is also its model's output head.

An adapter's tensors decide whether the two stay one weight. PEFT keeps them tied if both modules change in the same
way. If only one changes, or both change differently, its model has two weights from then on.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np

from lora_jax.adapters.full import RowsAdapter
from lora_jax.adapters.protocol import Adapter
from lora_jax.peft import keys
from lora_jax.peft.adapter_tensors import AdapterTensors
from lora_jax.peft.config import Config
from lora_jax.peft.keys import Key
from lora_jax.peft.tensors import Tensors

_HEADS = ("lm_head.weight", "embed_out.weight")

_TABLES = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight", "shared.weight")
_WITH_HEAD = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")
_TASKS_WITH_HEAD = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
_MASKED_HEAD = "cls.predictions.decoder.weight"
# By model_type, in transformers 5.24; other models have `lm_head`, or the head of BERT.
_HEADS_OF = {
    "albert": "predictions.decoder.weight",
    "bert": _MASKED_HEAD,
    "distilbert": "vocab_projector.weight",
    "gpt_neox_japanese": "embed_out.weight",
    **dict.fromkeys(("biogpt", "trocr"), "output_projection.weight"),
    **dict.fromkeys(("convbert", "electra"), "generator_lm_head.weight"),
    **dict.fromkeys(("moonshine", "moonshine_streaming", "whisper"), "proj_out.weight"),
    **dict.fromkeys(("bert-generation", "data2vec-text", "esm", "longformer", "mpnet"), "lm_head.decoder.weight"),
    **dict.fromkeys(("camembert", "roberta", "roberta-prelayernorm", "xmod"), "lm_head.decoder.weight"),
    **dict.fromkeys(("xlm-roberta", "xlm-roberta-xl"), "lm_head.decoder.weight"),
}


def has_tokens(name: str) -> bool:
    """Whether a tensor has a row for each token (an embedding or the head of a language model), by its name."""
    return name.endswith((*_TABLES, *_HEADS))


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` ties the head to the embedding, if the checkpoint stores no head."""
    inner = config.get("text_config")
    stated = config.get("tie_word_embeddings")
    if stated is None and isinstance(inner, Mapping):
        stated = inner.get("tie_word_embeddings")
    return stated is not False


def is_shared(table: str, names: Iterable[str]) -> bool:
    """Whether an encoder and a decoder have their own modules for a table, as in T5 and BART.

    transformers calls `encoder.embed_tokens` and `decoder.embed_tokens`, which have the weight of `shared`, and never
    `shared` itself. So a PEFT wrapper of `shared` has no effect, except for trained rows, which PEFT shares.

    Args:
      table: The name of a tensor.
      names: The names of all tensors of the model.
    """
    parent, _, last = keys.split_name(table)[0].rpartition(".")
    if last == "shared":
        return True
    prefix = f"{parent}." if parent else ""
    return table.endswith(_TABLES) and all(
        any(name.startswith(f"{prefix}{part}.") for name in names) for part in ("encoder", "decoder")
    )


def describe_shared(module: str) -> str:
    """The problem of an adapter on a table for which :func:`is_shared` holds."""
    return (
        f"no effect in PEFT: {module} is wrapped, and the model calls encoder.embed_tokens and decoder.embed_tokens, "
        "which have its weight"
    )


def check_shared(
    delta: Mapping[str, Adapter], untied: Iterable[tuple[str, str]], names: Collection[str], config: Mapping[str, Any]
) -> None:
    """Checks that an adapter can be merged into a checkpoint whose encoder and decoder share a table.

    Args:
      delta: The adapter of the checkpoint's tensors.
      untied: Tables and heads that are tied in the checkpoint, and two weights with the adapter.
      names: The names of the checkpoint's tensors.
      config: The content of its `config.json`.

    Raises:
      ValueError: The head must be stored separately, with tie_word_embeddings false: BART's encoder and decoder would
        lose their table, and T5 would scale its logits differently. Or PEFT does not share trained rows: Marian's
        input embedding is its encoder's.
    """
    for table, head in untied:
        if is_shared(table, names):
            module = keys.split_name(head)[0]
            raise ValueError(
                f"the adapter changes {module} alone, and the encoder, the decoder and {module} of this base are one "
                f"table ({table}), which transformers cannot load with tie_word_embeddings false: keep the adapter "
                f"prefix the base; ignore=({module!r},) merges the rest."
            )
    for path, node in delta.items():
        name = path.replace("/", ".")
        if isinstance(node, RowsAdapter) and config.get("model_type") == "marian" and is_shared(name, names):
            module = keys.split_name(name)[0]
            raise ValueError(
                f"the adapter trains rows of {module}, which PEFT does not share with the encoder and the decoder of "
                f"Marian: they change nothing there; ignore=({module!r},) passes them over."
            )


def tied_head(table: str, config: Mapping[str, Any], task: str | None = None) -> str | None:
    """Returns the name of the head that shares an embedding's weight, in a checkpoint that does not store the head.

    Args:
      table: The name of an embedding's tensor.
      config: The content of the checkpoint's `config.json`.
      task: The adapter's `task_type`, used if the config names no architecture.

    Returns:
      The name of the head's tensor; None if the tensor is not such an embedding, or the model has no head.
    """
    if not table.endswith(_TABLES) or not is_tied(config):
        return None
    classes = [str(name) for name in names] if isinstance(names := config.get("architectures"), list) else []
    if not any(name.endswith(_WITH_HEAD) for name in classes) and (classes or task not in _TASKS_WITH_HEAD):
        return None
    if (head := _HEADS_OF.get(str(config.get("model_type")))) is not None:
        return head
    if any(name.endswith(("ForMaskedLM", "ForPreTraining")) for name in classes):
        return _MASKED_HEAD
    outer = re.match(r"(language_model\.)", table)
    return f"{outer[1] if outer else ''}lm_head.weight"


def untied_reason(table: Iterable[Key], head: Iterable[Key], config: Config, tensors: AdapterTensors) -> str:
    """Why an adapter makes the two modules of a tied weight different; empty if they stay one weight.

    Args:
      table: The adapter's keys of the embedding's module.
      head: The adapter's keys of the head's module.
      config: The adapter's config.
      tensors: The adapter's open tensors.

    Raises:
      ValueError: The config has one list of rows for both modules, and the file has different rows.
    """
    one, other = ({key.part: key for key in group} for group in (table, head))
    values = [parts["value"] for parts in (one, other) if "value" in parts]
    saved = any(keys.saved_module(key.module, config.modules_to_save) for key in values)
    for parts in (one, other):
        if not saved or "a" in parts or "b" in parts:
            parts.pop("value", None)  # PEFT's copy of the base's weight: has factors, or no modules_to_save names it
    names = [next((key.module for key in parts.values()), "") for parts in (one, other)]
    if not one and not other:
        return ""
    if set(one) == {"rows"} and not other:
        return ""  # PEFT shares the rows between the two
    if not one or not other:
        changed = names[0] or names[1]
        return f"the adapter changes {changed} alone"
    if set(one) != set(other):
        return f"the adapter changes {names[0]} and {names[1]} in different ways"
    for part, twin in (("a", "b"), ("b", "a"), ("value", "value"), ("rows", "rows")):
        if part not in one:
            continue
        if part == "rows" and "" in config.trainable_token_indices:
            check_equal_rows(one[part], other[part], tensors)
        first, second = tensors.read(one[part].key), tensors.read(other[twin].key)
        if part in ("a", "b"):
            second = second.T
        if first.shape != second.shape or (first != second).any():
            how = "the transpose of" if part in ("a", "b") else "equal to"
            return f"{one[part].key} is not {how} {other[twin].key}"
    if "a" in one and config.scale(names[0]) != config.scale(names[1]):
        return f"the scales of {names[0]} and {names[1]} differ"
    return ""


def check_equal_rows(one: Key, other: Key, tensors: AdapterTensors) -> None:
    """Raises `ValueError` unless the rows of two modules of one weight are equal, as PEFT writes them."""
    if not np.array_equal(tensors.read(one.key), tensors.read(other.key)):
        raise ValueError(
            f"{one.key} and {other.key} differ, and {one.module} and {other.module} are one weight of this base: PEFT "
            "trains the same rows for both, so the file is for another base, or was edited."
        )


def share_rows(delta: dict[str, Adapter], checkpoint: Tensors, config: Mapping[str, Any]) -> None:
    """Copies an embedding's trained rows to a head that the checkpoint stores with equal values.

    transformers ties the two if they are equal, and PEFT shares trained rows between tied modules.
    """
    for table in list(checkpoint):
        path, head = table.replace(".", "/"), tied_head(table, config)
        node = delta.get(path)
        if not isinstance(node, RowsAdapter) or head is None or head not in checkpoint:
            continue
        if head.replace(".", "/") not in delta and np.array_equal(checkpoint.read(table), checkpoint.read(head)):
            delta[head.replace(".", "/")] = node
