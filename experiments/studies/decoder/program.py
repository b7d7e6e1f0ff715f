"""The model, adapter and training step of a study, for arrays on a mesh or for abstract shapes."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import lora_jax as lora
from experiments.configs.decoder import DecoderConfig
from experiments.errors import UserError
from experiments.models import checkpoint, families, location, shapes
from experiments.models.formats import make_format
from experiments.models.options import Options, Platform, Remat
from experiments.models.weights import flatten_weights, map_weights
from experiments.studies.decoder.adapters import (
    LINEAR,
    check_adapter,
    has_dropout,
    make_spec,
    new_adapter,
    read_adapter,
)
from experiments.studies.decoder.choices import choose_rate, choose_remat, count_weights
from experiments.training import mesh as meshes
from experiments.training.optimizer import adam
from lora_jax.peft import Names
from lora_jax.quantization import Format, Plan, gathered, shardings

LARGE = 100_000
"""Minimum size of optimizer state leaves that `optimizer_on_host` moves to the host."""


@dataclass(frozen=True)
class Objective:
    """What a study trains.

    Attributes:
      make_loss: `make_loss(apply, dropout)` returns a loss for `lora.train_step`; `dropout` says whether adapters drop
        out.
      batch: The shapes and dtypes of a batch by name.
      has_aux: Whether the loss also returns metrics.
      spec: Recipes that precede those of the config.
      adapt_family: Returns the architecture of what is trained, of that of the language model and its `config.json`.
    """

    make_loss: Callable[[Callable, bool], Callable]
    batch: Mapping[str, jax.ShapeDtypeStruct]
    has_aux: bool = True
    spec: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    adapt_family: Callable[[families.Family, Mapping[str, Any]], families.Family] = lambda family, description: family


@dataclass(frozen=True)
class Program:
    """A model, its adapter and its training step on a mesh.

    Attributes:
      config: The study's config.
      mesh: The device mesh.
      family: The architecture.
      shape: The architecture's config of the model.
      model: The abstract model.
      apply: `apply(base, tokens, segments, positions, labels_BL=…)`.
      base: Shapes and shardings of the parameters.
      delta: Shapes and shardings of the adapter.
      start: The adapter to start from; None initializes a new one.
      objective: What is trained.
      loss: The loss of the objective.
      tx: The optimizer.
      step: The result of `lora.train_step`.
    """

    config: DecoderConfig
    mesh: Mesh
    family: families.Family
    shape: Any
    model: Any
    apply: Callable
    base: Any
    delta: Any
    start: Any
    objective: Objective
    loss: Callable
    tx: optax.GradientTransformation
    step: Any

    @property
    def tokens(self) -> int:
        """Number of tokens per step."""
        return self.config.batch_size * self.config.row_length

    def load(self, directory: Path) -> Any:
        """Loads the base from a checkpoint, each shard directly onto its device."""
        sharding = meshes.weight_shardings(self.mesh, self.family.axes)
        dtype, options = jnp.dtype(self.config.dtype), self.model.options
        model = self.family.load(
            directory,
            options,
            dtype=dtype,
            sharding=sharding,
            rules=quantization_rules(self.config),
            stored=self.config.quantize == "stored",
        )
        return gathered(lora.nnx.functional(model)[1], meshes.FSDP)

    def create(self, key: jax.Array, base: Any) -> lora.TrainState:
        """Creates the initial state for a base on the mesh."""
        init_key, train_key = jax.random.split(key)
        if self.start is not None:
            delta = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), self.start, self.delta)
        else:
            spec = {**self.objective.spec, **make_spec(self.config, self.base)}
            example = _example(self.config)
            delta = meshes.init_delta(
                self.mesh, lambda key, base: lora.init(key, base, spec, self.apply, example), init_key, base
            )
        return lora.TrainState.create(base, delta, self.tx, train_key)

    def state(self) -> lora.TrainState:
        """Returns the shapes and shardings of the state."""
        create = functools.partial(lora.TrainState.create, tx=self.tx)
        state = jax.eval_shape(create, self.base, self.delta, key=jax.eval_shape(lambda: jax.random.key(0)))
        return with_shardings(state, lora.state_shardings(self.base, state, self.tx))

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes and shardings of a batch."""
        sharding = meshes.batch_sharding(self.mesh)
        return {
            name: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
            for name, array in self.objective.batch.items()
        }

    def lower(self) -> jax.stages.Lowered:
        """Lowers the step for the devices of the mesh."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state(), self.batch())

    def parts(self) -> dict[str, Any]:
        """Returns the shapes and shardings of the step's inputs by name."""
        state = self.state()
        return {"base": state.base, "delta": state.delta, "optimizer": state.opt_state, "batch": self.batch()}


def abstract(
    config: DecoderConfig,
    objective: Objective,
    devices: Sequence[jax.Device] | None = None,
    platform: Platform | None = None,
    *,
    steps: int = 1000,
) -> Program:
    """Returns the program of a config from shapes alone. It computes nothing and reads no weights.

    Args:
      config: The study's config. The model may be one of which only the shape is shipped.
      objective: What is trained.
      devices: The devices of the mesh; None uses all devices.
      platform: The platform of the devices, if it differs from this process's.
      steps: Total number of steps, for the learning rate schedule.

    Raises:
      UserError: The model is unknown, or model, batch and mesh are incompatible.
    """
    description = read_description(config.model)
    mesh = make_mesh(config, devices)
    family = objective.adapt_family(families.get_family(description), description)
    shape = family.shape(description)
    _check_heads(config, shape)
    remat = choose_remat(config, shape, count_weights(description), platform)
    options = model_options(config, remat, platform, scan=_is_scanned(config, family, shape))
    model = nnx.eval_shape(lambda: family.build(shape, options, rngs=nnx.Rngs(0)))
    if model.trained_length is not None and config.row_length > model.trained_length:
        raise UserError(
            f"length {config.row_length:,}: {config.model} supports sequences of up to {model.trained_length:,} tokens"
        )
    apply, base = lora.nnx.functional(model)
    with jax.set_mesh(mesh):
        base = _base(config, base, apply, family.names(shape), meshes.weight_shardings(mesh, family.axes))
        key, tokens = jax.eval_shape(lambda: jax.random.key(0)), _example(config)
        try:
            jax.eval_shape(lora.adapt(apply), base, {}, tokens)
        except ValueError as error:
            raise UserError(f"{config.model}: {error}") from None
        start = None
        if config.init_from is not None:
            start = read_adapter(config.init_from, base, family.names(shape), jnp.dtype(config.adapter_dtype))
            delta = jax.tree.map(jax.typeof, start)
        else:
            delta = new_adapter(config, base, apply, key, tokens, objective.spec)
    delta = with_shardings(delta, lora.delta_shardings(base, delta))
    tx = adam(
        choose_rate(config, description),
        steps,
        warmup=config.warmup,
        clip=config.clip,
        weight_decay=config.weight_decay,
        schedule=config.schedule,
        floor=config.lr_floor,
        decay=config.decay,
    )
    if config.optimizer_on_host:
        tx = lora.optim.host_offloaded(tx, min_size=LARGE)
    dropout = config.dropout > 0 or has_dropout(start)
    loss = objective.make_loss(apply, dropout)
    step = lora.train_step(loss, tx, accumulate=config.batch.accumulate, has_aux=objective.has_aux)
    return Program(config, mesh, family, shape, model, apply, base, delta, start, objective, loss, tx, step)


def check(config: DecoderConfig) -> None:
    """Checks a config before any data is read.

    Raises:
      UserError: See :func:`make_mesh`, or there is no adapter to start from.
    """
    if config.init_from is not None:
        check_adapter(config.init_from)
    make_mesh(config)


def make_mesh(config: DecoderConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh of a config.

    Raises:
      UserError: The number of devices differs from the mesh's, or the mesh does not divide the batch or a sequence.
    """
    mesh = meshes.make_mesh(config.mesh, devices)
    meshes.check_batch(config.batch_size, config.mesh, "batch.global", accumulate=config.batch.accumulate)
    if config.mesh.sequence and config.row_length % config.mesh.tensor:
        fits = meshes.nearest_fits(config.row_length, lambda n: n % config.mesh.tensor == 0)
        raise UserError(
            f"length {config.row_length} is not divisible by mesh.tensor {config.mesh.tensor}, which mesh.sequence "
            f"requires; the nearest lengths are {' and '.join(map(str, fits))}"
        )
    return mesh


def _check_heads(config: DecoderConfig, shape: Any) -> None:
    heads, tensor = getattr(shape, "num_key_value_heads", None) or shape.n_head, config.mesh.tensor
    if heads % tensor:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(
            f"mesh.tensor {tensor} does not divide the {heads} key heads of {config.model}; use one of {fits}"
        )


def read_description(model: str) -> Mapping[str, Any]:
    """Reads the `config.json` of a model, or of a model of which only the shape is shipped."""
    return shapes.read(model) if shapes.has(model) else checkpoint.read_config(location.find(model))


def _is_scanned(config: DecoderConfig, family: families.Family, shape: Any) -> bool:
    """Whether layers are stacked and scanned: unless a file stores layers of a weight as codes of different types."""
    if config.quantize != "stored":
        return True
    codes, names = checkpoint.require_codes(location.find(config.model)), family.names(shape)
    model = nnx.eval_shape(lambda: family.build(shape, Options(scan=True), rngs=nnx.Rngs(0)))
    weights = flatten_weights(lora.nnx.functional(model)[1])
    return all(codes.is_uniform(names.find(path, weight.shape)) for path, weight in weights.items())


def model_options(config: DecoderConfig, remat: Remat, platform: Platform | None, *, scan: bool = True) -> Options:
    """Returns the options of the model's computation."""
    kernel = config.attention
    if kernel == "auto":
        kernel = "flash" if (platform or jax.default_backend()) == "tpu" and config.row_length % 128 == 0 else "xla"
    return Options(
        scan=scan,
        remat=remat,
        dtype=jnp.dtype(config.dtype),
        attention=kernel,
        platform=platform,
        shards=config.mesh.shards,
        loss_chunk=config.loss_chunk,
    )


def quantization_rules(config: DecoderConfig) -> dict[str, Format | None]:
    """Returns the formats of quantized weights by pattern."""
    selected = make_format(config.quantize, double=config.double_quantization)
    return {} if selected is None else {"|".join(LINEAR.values()): selected}


def _base(config: DecoderConfig, base: Any, apply: Callable, names: Names, sharding: Callable) -> Any:
    """Returns the shapes and shardings of the loaded weights: in the config's dtype, some of them quantized."""
    rules = quantization_rules(config)
    plan = Plan.of(base, rules, apply, _example(config)) if rules else None
    codes = checkpoint.require_codes(location.find(config.model)) if config.quantize == "stored" else None

    def leaf(path: str, weight: Any) -> Any:
        weight_sharding = sharding(path, weight.shape)
        weight = jax.ShapeDtypeStruct(weight.shape, jnp.dtype(config.dtype), sharding=weight_sharding)
        binding = names.find(path, weight.shape)
        if codes is not None and codes.kind(binding) is not None:
            quantized = codes.abstract(binding, weight.dtype)
        elif plan is not None and path in plan.chosen:
            quantized = jax.eval_shape(lambda weight: plan(path, weight), weight)
        else:
            return weight
        try:
            return with_shardings(quantized, shardings(quantized, weight_sharding))
        except ValueError as error:
            raise UserError(f"quantize {config.quantize}: {error}") from None

    return gathered(map_weights(leaf, base), meshes.FSDP)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Adds shardings to shapes."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree, shardings
    )


def _example(config: DecoderConfig) -> jax.ShapeDtypeStruct:
    """Returns the shape of the tokens with which a model is traced."""
    return jax.ShapeDtypeStruct((config.batch_size // config.batch.accumulate, config.row_length), jnp.int32)
