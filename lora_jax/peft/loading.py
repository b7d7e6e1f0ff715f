"""Loads PEFT adapter directories as deltas."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_jax import checks
from lora_jax.adapters.protocol import Adapter
from lora_jax.peft import keys
from lora_jax.peft.base_index import bindings_of
from lora_jax.peft.config import CONFIG
from lora_jax.peft.load_context import LoadContext
from lora_jax.peft.loader import load_delta
from lora_jax.peft.methods import load_method, method_in
from lora_jax.peft.names import Names, check_names
from lora_jax.peft.opening import find_adapter, open_adapter
from lora_jax.peft.tensors import read_json


def load(directory: str | os.PathLike, base: Any, names: Names, ignore: Sequence[str] = ()) -> dict[str, Adapter]:
    """Loads an adapter that PEFT wrote as a delta for `base`.

    Methods: LoRA and its variants, AdaLoRA, VeRA (with its projections), LoHa, LoKr, (IA)³, HiRA, MiSS, OFT, trainable
    tokens, and the tuning of norms.

    Args:
      directory: Contains `adapter_config.json` and `adapter_model.safetensors`; or a single directory that does
        (`default/`, `checkpoint-500/`), which a warning names.
      base: The parameters that the adapter is for; leaves may be `jax.ShapeDtypeStruct` if no stored tensor has to be
        compared with the base's.
      names: The names of the base's leaves in PyTorch.
      ignore: Tensors that do not belong to the adapter, by the beginning of their name, or of a part of it between
        dots: `ignore=("v_head",)`.

    Returns:
      `{path: adapter}`: `LoRA` and `DoRA` from factors, `Offset` from biases on B, `Full` from saved modules and
      biases, `Rows` from trainable tokens. If a layer has no bias, a bias on B becomes the `bias` of its LoRA, which
      applies unmerged only. Layers of a stacked leaf without factors get factors of zeros; uneven ranks are padded
      with zeros, which training leaves at zero.

    Raises:
      ValueError: A file is missing or damaged; or tensors are missing, unused, of another shape, or cannot be
        represented on this base: the message lists all of them.

    Example:
      See :func:`save`.
    """
    checks.path("lora.peft.load(directory, base, names)", directory)
    check_names("lora.peft.load(directory, base, names)", names)
    outer = Path(directory)
    directory = find_adapter(outer)
    if directory != outer:
        warnings.warn(f"{outer}: the adapter in {directory.relative_to(outer)} is read.", stacklevel=2)
    if method_in(directory) is not None:
        return load_method(directory, read_json(directory / CONFIG), base, names, ignore)
    modules = (
        keys.split_name(name)[0] for _, binding in bindings_of(base, names) for name in binding.in_model.values()
    )
    with open_adapter(directory, ignore, modules) as (config, tensors):
        context = LoadContext(config, tensors, base, names)
        return context.finish(directory, load_delta(context))
