"""Finds changes of a config with which its step fits the chips."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.studies.decoder.program import read_description
from experiments.studies.sft import program
from experiments.training.chips import GIB
from experiments.training.mesh import MeshSizes

_SHOWN = 3


def advice(config: Config, devices: Sequence[Any], needed: float, available: float) -> str:
    """Returns a sentence with changes of a config with which its step should fit.

    The estimate counts the arguments of the changed step, scales the other memory by the tokens that a chip processes
    at a time, and subtracts the inputs of the layers for `remat=offload`. Only compiling again gives the exact memory.

    Args:
      config: A config whose step does not fit.
      devices: The devices that it was compiled for.
      needed: The bytes that it needs on one chip.
      available: The bytes that are available.
    """
    other = max(needed - argument_bytes(config, devices), 0.0)
    fitting: dict[str, str] = {}
    for kind, flags, changed in changes(config):
        if kind in fitting:
            continue
        try:
            arguments = argument_bytes(changed, devices)
        except (UserError, ValueError):  # the mesh does not divide the model or the batch
            continue
        total = arguments + other * tokens_at_a_time(changed) / tokens_at_a_time(config)
        if changed.remat == "offload" and config.remat != "offload":
            total -= inputs_of_layers(changed)
        if total <= available:
            fitting[kind] = f"{flags} (about {total / GIB:.1f} GiB)"
    missing = f"{(needed - available) / GIB:.2f} GiB per chip are missing"
    if not fitting:
        return f"{missing}, and no single change of mesh, batch, remat or format is enough; use a larger slice"
    listed = list(fitting.values())[:_SHOWN]
    return f"{missing}; estimated to fit with " + ", or with ".join(listed)


def changes(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Yields changed configs for the same devices, cheapest first: the kind of change, its flags, and the config.

    Among changes of the same kind, the smallest comes first.
    """
    mesh, batch = config.mesh, config.batch

    def other_mesh(**sizes: Any) -> Config:
        return dataclasses.replace(config, mesh=dataclasses.replace(mesh, **sizes))

    for ways in _powers(mesh.data):
        data, fsdp = mesh.data // ways, mesh.fsdp * ways
        yield "fsdp", f"--mesh.data {data} --mesh.fsdp {fsdp}", other_mesh(data=data, fsdp=fsdp)
    for ways in _powers(config.batch_size // mesh.replicas // batch.accumulate):
        flags = f"--batch.accumulate {batch.accumulate * ways}"
        yield "accumulate", flags, _with_batch(config, accumulate=batch.accumulate * ways)
    if config.remat != "offload":
        yield "offload", "--remat offload", dataclasses.replace(config, remat="offload")
    for ways in _powers(mesh.replicas):
        shared = math.gcd(ways, mesh.data)
        sizes = {"data": mesh.data // shared, "fsdp": mesh.fsdp * shared // ways, "tensor": mesh.tensor * ways}
        named = " ".join(f"--mesh.{name} {size}" for name, size in sizes.items())
        yield "tensor", f"{named} --mesh.sequence", other_mesh(**sizes, sequence=True)
    if config.quantize == "none":
        yield "quantize", "--quantize nf4", dataclasses.replace(config, quantize="nf4")
    for ways in _powers(config.batch_size // mesh.replicas):
        size = config.batch_size // ways
        yield "batch", f"--batch.global {size}", _with_batch(config, global_=size)


def argument_bytes(config: Config, devices: Sequence[Any]) -> float:
    """Returns the bytes of the arguments of a config's step on one chip.

    Raises:
      UserError: The mesh does not divide the model or the batch.
    """
    step = program.abstract(config, devices, "tpu")
    leaves = jax.tree.leaves(step.parts())
    on_device = [leaf for leaf in leaves if leaf.sharding.memory_kind in (None, "device")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _width(leaf.dtype) for leaf in on_device)


def tokens_at_a_time(config: Config) -> float:
    """Returns the number of tokens of a microbatch that a chip holds between layers."""
    mesh: MeshSizes = config.mesh
    parts = mesh.replicas * config.batch.accumulate * (mesh.tensor if mesh.sequence else 1)
    return config.batch_size * config.row_length / parts


def inputs_of_layers(config: Config) -> float:
    """Returns the bytes of the inputs of all layers on one chip, which the backward pass uses."""
    content = read_description(config.model)
    layers = content.get("num_hidden_layers") or content["n_layer"]
    width = content.get("hidden_size") or content["n_embd"]
    return layers * width * tokens_at_a_time(config) * _width(config.dtype)


def _with_batch(config: Config, **sizes: int) -> Config:
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, **sizes))


def _powers(most: int) -> Iterator[int]:
    """Yields 2, 4, 8 … while they divide a number."""
    ways = 2
    while ways <= most and most % ways == 0:
        yield ways
        ways *= 2


def _width(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else jax.numpy.dtype(dtype).itemsize
