"""Settings that a config leaves to the model."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console

from experiments.configs.decoder import DecoderConfig
from experiments.models import families
from experiments.models.activations import activation_bytes
from experiments.models.decoder import Decoder
from experiments.models.options import Options, Platform, Remat
from experiments.studies.decoder.adapters import is_full
from experiments.training.optimizer import published_rate

_BYTES = {"nf4": 0.6, "fp4": 0.6, "int4": 0.6, "int8": 1.1}  # of a quantized weight
_FASTEST_FIRST: tuple[Remat, ...] = ("none", "dots", "full")

C = TypeVar("C", bound=DecoderConfig)


def choose(config: C, description: Mapping[str, Any], console: Console) -> C:
    """Returns a config with a learning rate and a batch size, and prints those that it leaves to the model or the mesh.

    Args:
      config: The study's config.
      description: The model's `config.json`.
      console: The output.
    """
    if config.batch.global_ is None:
        parts = f"a mesh of {config.mesh}"
        parts += f" and {config.batch.accumulate} microbatches" if config.batch.accumulate > 1 else ""
        console.print(f"batch.global {config.batch_size}: the smallest for {parts}", highlight=False, soft_wrap=True)
    batch = replace(config.batch, global_=config.batch_size)
    return replace(config, lr=choose_rate(config, description, console), batch=batch)


def choose_rate(config: DecoderConfig, description: Mapping[str, Any], console: Console | None = None) -> float:
    """Returns the learning rate of a config. Unless the config has a number, it depends on the model.

    Args:
      config: The study's config.
      description: The model's `config.json`.
      console: Where to print a rate that is chosen, and where it comes from.
    """
    if isinstance(config.lr, float | int):
        return config.lr
    full = trains_base(config)
    if config.lr is None and config.model in config.SWEPT and not full:
        rate, origin = config.SWEPT[config.model], f"the best of short runs of {config.model}"
    else:
        kind, size = str(description.get("model_type")), description.get("hidden_size") or description.get("n_embd")
        rate = float(f"{published_rate(int(size or 2000), kind, full=full):.2g}")
        origin = f"the published rule for {'full fine-tuning' if full else 'LoRA'} on a model of hidden size {size:,}"
    if console is not None:
        console.print(f"lr {rate:.2g}: {origin}", highlight=False, soft_wrap=True)
    return rate


def choose_remat(
    config: DecoderConfig, shape: Any, weights: int, platform: Platform | None = None, console: Console | None = None
) -> Remat:
    """Returns what a step rematerializes: as little as the memory of its devices allows.

    The choice depends on the settings and on the machine, not on what else is running, so that a run resumes with it.

    Args:
      config: The study's config.
      shape: The architecture's config of the model.
      weights: Number of weights of the base.
      platform: The platform to compile for ahead of time, whose memory is unknown.
      console: Where to print a choice.
    """
    if config.remat != "auto":
        return config.remat
    if platform is not None:
        return "full"
    mesh, size = config.mesh, np.dtype(jnp.dtype(config.dtype)).itemsize
    rows = config.rows_per_example * config.batch_size // (config.batch.accumulate * mesh.replicas) or 1
    base = weights * _BYTES.get(config.quantize, size) / (mesh.fsdp * mesh.tensor)
    trained = 0.0
    if trains_base(config):  # a copy of the weights, their gradients and, unless it is on the host, Adam's state
        copies = 2 if config.optimizer_on_host else 4
        trained = copies * weights * np.dtype(jnp.dtype(config.adapter_dtype)).itemsize / (mesh.fsdp * mesh.tensor)
    memory = device_memory(mesh.count)
    budget = (memory - base - trained) / 2
    flash = config.attention in ("flash", "cudnn")
    estimates: dict[Remat, float] = {
        remat: activation_bytes(shape, rows, config.row_length, size, remat, flash=flash) for remat in _FASTEST_FIRST
    }
    chosen: Remat = "full"
    for remat in reversed(_FASTEST_FIRST):
        if estimates[remat] <= budget:
            chosen = remat
    if console is not None:
        about = f"about {estimates[chosen] / 1e9:.2g} GB of activations, {base / 1e9:.2g} GB of weights"
        about += f", {trained / 1e9:.2g} GB of trained weights with gradients and optimizer state" if trained else ""
        console.print(f"remat {chosen}: {about}, {memory / 1e9:.3g} GB of memory", highlight=False, soft_wrap=True)
    return chosen


def trains_base(config: DecoderConfig) -> bool:
    """Whether a config trains all weights of the base: full fine-tuning, from the base or from fine-tuned weights."""
    return config.method == "full" or (config.init_from is not None and is_full(config.init_from))


def device_memory(devices: int) -> float:
    """Returns the bytes of memory of a device, or this device's part of the host's memory."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return float(stats["bytes_limit"])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / devices


def longest_sequence(description: Mapping[str, Any]) -> int | None:
    """Returns the longest sequence that a model supports; None if unknown."""
    return _abstract(description).trained_length


def count_weights(description: Mapping[str, Any]) -> int:
    """Returns the number of a model's weights."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(_abstract(description))))


def _abstract(description: Mapping[str, Any]) -> Decoder:
    family = families.get_family(description)
    shape = family.shape(description)
    return nnx.eval_shape(lambda: family.build(shape, Options(scan=True), rngs=nnx.Rngs(0)))
