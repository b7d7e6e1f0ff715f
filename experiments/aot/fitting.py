"""What would make a step fit that does not."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.studies.sft import program
from experiments.training.chips import GIB
from experiments.training.mesh import MeshSizes

_SHOWN = 3


def advice(config: Config, devices: Sequence[Any], needed: float, available: float) -> str:
    """A sentence that names changes of a config with which its step should fit.

    The arguments of the changed step are counted; what else the step takes is scaled by the tokens that a chip has at
    a time, and `remat=offload` takes the inputs of the layers off. That is arithmetic: only compiling again tells.

    Args:
      config: One whose step does not fit.
      devices: For which it was compiled.
      needed: Bytes of one chip that it takes.
      available: Bytes that there are.
    """
    beside = max(needed - argument_bytes(config, devices), 0.0)
    fitting: dict[str, str] = {}
    for kind, flags, changed in changes(config):
        if kind in fitting:
            continue
        try:
            given = argument_bytes(changed, devices)
        except (UserError, ValueError):  # what cannot be divided so is no advice
            continue
        takes = given + beside * tokens_at_a_time(changed) / tokens_at_a_time(config)
        if changed.remat == "offload" and config.remat != "offload":
            takes -= inputs_of_layers(changed)
        if takes <= available:
            fitting[kind] = f"{flags} (about {takes / GIB:.1f} GiB)"
    lacks = f"it lacks {(needed - available) / GIB:.2f} GiB a chip"
    if not fitting:
        return f"{lacks}, and no single change of mesh, batch, remat or format is enough: take a larger slice"
    shown = list(fitting.values())[:_SHOWN]
    return f"{lacks}; by arithmetic it fits with " + ", or with ".join(shown)


def changes(config: Config) -> Iterator[tuple[str, str, Config]]:
    """Other configs for the same devices: the kind of change, its flags, and the config; those first that cost least.

    Of a kind the smallest change comes first.
    """
    mesh, batch = config.mesh, config.batch

    def other_mesh(**sizes: Any) -> Config:
        return dataclasses.replace(config, mesh=dataclasses.replace(mesh, **sizes))

    for ways in _powers(mesh.data):
        data, fsdp = mesh.data // ways, mesh.fsdp * ways
        yield "fsdp", f"--mesh.data {data} --mesh.fsdp {fsdp}", other_mesh(data=data, fsdp=fsdp)
    for ways in _powers(batch.global_ // mesh.replicas // batch.accumulate):
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
    for ways in _powers(batch.global_ // mesh.replicas):
        yield "batch", f"--batch.global {batch.global_ // ways}", _with_batch(config, global_=batch.global_ // ways)


def argument_bytes(config: Config, devices: Sequence[Any]) -> float:
    """Bytes of one chip that the step of a config is given.

    Raises:
      UserError: The config cannot be put on its mesh.
    """
    made = program.abstract(config, devices, "tpu")
    leaves = jax.tree.leaves(made.parts())
    on_device = [leaf for leaf in leaves if leaf.sharding.memory_kind in (None, "device")]
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * _width(leaf.dtype) for leaf in on_device)


def tokens_at_a_time(config: Config) -> float:
    """Tokens of a microbatch that a chip has between layers."""
    mesh: MeshSizes = config.mesh
    parts = mesh.replicas * config.batch.accumulate * (mesh.tensor if mesh.sequence else 1)
    return config.batch.global_ * config.length / parts


def inputs_of_layers(config: Config) -> float:
    """Bytes of one chip that the inputs of all layers take, which the backward pass starts from."""
    described = program.described(config.model)
    layers = described.get("num_hidden_layers") or described["n_layer"]
    width = described.get("hidden_size") or described["n_embd"]
    return layers * width * tokens_at_a_time(config) * _width(config.dtype)


def _with_batch(config: Config, **sizes: int) -> Config:
    return dataclasses.replace(config, batch=dataclasses.replace(config.batch, **sizes))


def _powers(most: int) -> Iterator[int]:
    """2, 4, 8 … as long as they divide a number."""
    ways = 2
    while ways <= most and most % ways == 0:
        yield ways
        ways *= 2


def _width(dtype: Any) -> int:
    return 8 if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key) else jax.numpy.dtype(dtype).itemsize
