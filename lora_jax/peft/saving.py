"""Deltas to directories that PEFT and other consumers of its adapters read."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_jax import checks
from lora_jax.adapters.consistency import check_adapters
from lora_jax.adapters.fingerprints import needs_moved_base
from lora_jax.adapters.protocol import Adapter
from lora_jax.io.read_errors import list_problems
from lora_jax.peft import experts
from lora_jax.peft.exported import export
from lora_jax.peft.methods import method_of, save_method
from lora_jax.peft.modules_to_save import complete
from lora_jax.peft.names import Names, check_names
from lora_jax.peft.targets import TARGETS


def save(
    directory: str | os.PathLike,
    delta: Mapping[str, Adapter],
    names: Names,
    *,
    target: str = "peft",
    base: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
) -> None:
    """Writes a delta as an adapter for PyTorch's world.

    Args:
      directory: Where to; an adapter that is there is replaced when the new one is complete.
      delta: Adapters that are all of one method of PEFT, and leaves trained outright (`Full`). LoRA, DoRA, Offset and
        Rows are PEFT's LoRA; AdaLoRA, VeRA, LoHa, LoKr and IA3, Rows alone and trained norms alone are its methods of
        these names (target 'peft' only). Low-rank adapters of several methods, for other targets, or that their method
        cannot hold (VeRA whose pairs differ by the weight's size), are written as the LoRA that they equal.
      names: Where the leaves stand in PyTorch.
      target: Who is to read it: 'peft'; 'vllm' and 'gguf' (llama.cpp's converter), which read PEFT's format in
        part: uneven scales are folded into B; or 'mlx' (mlx-lm), with files of its own.
      base: The parameters. With them a delta may train a part of what PEFT saves whole (a norm's scale without its
        bias, one layer's bias, no classification head of a `task_type` that saves it): the rest is taken from them.
      base_model: The name or path of the base, for the reader's sake.
      task_type: PEFT's name of the kind of model ('CAUSAL_LM', 'SEQ_CLS'), by which its Auto classes choose.

    Raises:
      ValueError: The delta holds what the target cannot: all of it is named, and nothing is written. It is from
        :func:`lora_jax.prepare`, which changed the base: :func:`lora_jax.to_plain_lora` makes one for the original.
      FileExistsError: The directory exists and is no adapter.

    Example:
      >>> import jax, jax.numpy as jnp, lora_jax as lora, tempfile
      >>> base = {"up": {"kernel": jnp.ones((4, 6))}}
      >>> delta = lora.init(jax.random.key(0), base, {"up": lora.LoRA(2, alpha=4, axes=("in", "out"))})
      >>> names = lora.peft.Names((lora.peft.Weight("up/kernel", "mlp.up_proj.weight", lora.peft.LINEAR),))
      >>> lora.peft.save(tempfile.mkdtemp(), delta, names, target="vllm")
      vLLM needs max_lora_rank of at least 8 for this adapter of rank 2.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r}; expected one of {', '.join(map(repr, TARGETS))}.")
    check_adapters(delta)
    checks.path("lora.peft.save(directory, delta, names)", directory)
    check_names("lora.peft.save(directory, delta, names)", names)
    if not delta:
        raise ValueError("There is nothing to save: the delta is empty.")
    write(Path(directory), delta, names, target, base=base, base_model=base_model, task_type=task_type)


def write(
    directory: Path,
    delta: Mapping[str, Adapter],
    names: Names,
    target: str,
    *,
    base: Any = None,
    base_model: str | None = None,
    task_type: str | None = None,
    modules_to_save: Sequence[str] = (),
) -> None:
    """What :func:`save` does, of an adapter whose config names modules that are saved whole."""
    if moved := [path for path, node in delta.items() if needs_moved_base(node)]:
        raise ValueError(
            f"{moved[0]!r} ({len(moved)} such paths): the adapter needs the base that lora_jax.prepare changed, and no "
            "reader of this file has it. lora_jax.to_plain_lora(delta, start) makes an adapter for the original "
            "weights, which can be written."
        )
    if target == "peft" and (kind := method_of(delta, names)) is not None:
        save_method(directory, kind, delta, names, base=base, base_model=base_model, task_type=task_type)
        return
    if target != "peft":  # the others know checkpoint files, PEFT knows the running model
        names = names.in_files()
    exported = export(delta, names)
    experts.fuse(exported, names)
    complete(exported, names, base, task_type if target == "peft" else None, modules_to_save)
    if target != "peft" and not any(m.offset is not None and m.offset.any() for m in exported.modules):
        exported.modules = [dataclasses.replace(module, offset=None) for module in exported.modules]
    problems = [*exported.problems, *TARGETS[target].refuses(exported)]
    if problems:
        raise ValueError(f"The delta cannot be written for {TARGETS[target].reader} {list_problems(problems)}")
    TARGETS[target].write(directory, exported, base_model, task_type)
