"""The training step of a config: the very same for arrays on a mesh, and for shapes on devices that are not here."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

import lora_jax as lora
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.models import checkpoint, families, location, shapes
from experiments.models.options import Options, Platform
from experiments.training import mesh as meshes
from experiments.training.optimizer import adam
from lora_jax import paths
from lora_jax.quantization import Format, Plan, gathered, shardings

LINEAR = {
    "attention": r"attention/(query|key|value|qkv|output)/kernel$",
    "feed-forward": r"feed_forward/(gate|up|down)/kernel$",
}
"""Linear layers of all blocks, by the names of targets; a quantized base has all of them quantized."""

OTHERS = {"embedding": r"^token/embedding$", "head": r"^output/kernel$"}
_OURS, _PEFT = "adapter.json", "adapter_config.json"  # what marks an adapter's directory
LARGE = 100_000
"""Elements from which on a leaf of the optimizer's state goes to the host."""


@dataclass(frozen=True)
class Program:
    """A model, its adapter and the step that trains it, on a mesh.

    Attributes:
      config: Of the study.
      mesh: The devices.
      family: The architecture.
      shape: The model's.
      model: An abstract one.
      apply: `apply(base, tokens, segments, positions, labels_BL=…)`.
      base: The parameters' shapes, with their shardings.
      delta: The adapter's, likewise.
      start: The adapter to start from; None draws a new one.
      loss: `loss(base, delta, batch, key) -> (sum, count)`, over a batch's labels.
      tx: The optimizer.
      step: From `lora.train_step`.
    """

    config: Config
    mesh: Mesh
    family: families.Family
    shape: Any
    model: Any
    apply: Callable
    base: Any
    delta: Any
    start: Any
    loss: Callable
    tx: optax.GradientTransformation
    step: Any

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.config.batch.global_ * self.config.length

    def load(self, directory: Path) -> Any:
        """The base from a checkpoint, each device's part straight onto it."""
        sharding = meshes.weight_shardings(self.mesh, self.family.axes)
        dtype, options = jnp.dtype(self.config.dtype), self.model.options
        model = self.family.load(directory, options, dtype=dtype, sharding=sharding, rules=rules_of(self.config))
        return gathered(lora.nnx.functional(model)[1], meshes.FSDP)

    def create(self, key: jax.Array, base: Any) -> lora.TrainState:
        """The state before the first step, on a base that lies on the mesh."""
        init_key, train_key = jax.random.split(key)
        if self.start is not None:
            delta = jax.tree.map(lambda leaf, shape: jax.device_put(leaf, shape.sharding), self.start, self.delta)
        else:
            spec, example = spec_of(self.config, self.base), _example(self.config)
            delta = meshes.init_delta(
                self.mesh, lambda key, base: lora.init(key, base, spec, self.apply, example), init_key, base
            )
        return lora.TrainState.create(base, delta, self.tx, train_key)

    def state(self) -> lora.TrainState:
        """The shapes of a state, with their shardings."""
        create = functools.partial(lora.TrainState.create, tx=self.tx)
        state = jax.eval_shape(create, self.base, self.delta, key=jax.eval_shape(lambda: jax.random.key(0)))
        return placed(state, lora.state_shardings(self.base, state, self.tx))

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """The shapes of a batch, with their shardings."""
        size = (self.config.batch.global_, self.config.length)
        one = jax.ShapeDtypeStruct(size, jnp.int32, sharding=meshes.batch_sharding(self.mesh))
        return dict.fromkeys(("tokens", "segments", "positions", "labels"), one)

    def lower(self) -> jax.stages.Lowered:
        """The step, lowered for the mesh's devices."""
        with jax.set_mesh(self.mesh):
            return self.step.lower(self.state(), self.batch())

    def parts(self) -> dict[str, Any]:
        """What the step is given, by name."""
        state = self.state()
        return {"base": state.base, "delta": state.delta, "optimizer": state.opt_state, "batch": self.batch()}


def abstract(
    config: Config, devices: Sequence[jax.Device] | None = None, platform: Platform | None = None, *, steps: int = 1000
) -> Program:
    """The program of a config; nothing is computed and no weight is read.

    Args:
      config: Of the study. Its model may be one of which only the shape is shipped.
      devices: What the mesh is made of; None takes all that are here.
      platform: Of the devices, where it is not this process's.
      steps: In the whole run, for the learning rate.

    Raises:
      UserError: The model is unknown, or it, the batch and the mesh do not go together.
    """
    mesh = check(config, devices)
    description = described(config.model)
    family = families.get_family(description)
    shape = family.shape(description)
    _check_heads(config, shape)
    options = options_of(config, platform)
    model = nnx.eval_shape(lambda: family.build(shape, options, rngs=nnx.Rngs(0)))
    if model.trained_length is not None and config.length > model.trained_length:
        raise UserError(
            f"length {config.length:,}: {config.model} is made for sequences of up to {model.trained_length:,} tokens"
        )
    apply, base = lora.nnx.functional(model)
    with jax.set_mesh(mesh):
        base = _base(config, base, apply, meshes.weight_shardings(mesh, family.axes))
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
            delta = _new_adapter(config, base, apply, key, tokens)
    delta = placed(delta, lora.delta_shardings(base, delta))
    tx = adam(
        config.lr,
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
    drops = config.dropout > 0 or _has_dropout(start)
    loss = _loss(apply, config, drops=drops)
    step = lora.train_step(loss, tx, accumulate=config.batch.accumulate)
    return Program(config, mesh, family, shape, model, apply, base, delta, start, loss, tx, step)


def _new_adapter(config: Config, base: Any, apply: Callable, key: Any, tokens: Any) -> Any:
    """The shapes of the adapter that a config describes.

    Raises:
      UserError: Something that it names cannot be adapted.
    """
    tied = "output/kernel" not in paths.flatten(base).paths
    if "head" in config.targets and tied:
        raise UserError(
            f"--targets head: the head of {config.model} is its token embedding; --targets embedding adapts both"
        )
    spec = spec_of(config, base)
    try:
        return jax.eval_shape(lambda key, base: lora.init(key, base, spec, apply, tokens), key, base)
    except ValueError as error:
        raise UserError(f"the adapter of {' and '.join(config.targets)}: {error}") from None


def read_adapter(directory: Path, base: Any, names: Any, dtype: jnp.dtype) -> Any:
    """An adapter to start from, in host memory.

    Args:
      directory: Written by `lora_jax.save` or by PEFT.
      base: The parameters, or their shapes.
      names: The names of the base's weights in Hugging Face layout.
      dtype: Of the trained leaves.

    Raises:
      UserError: There is no adapter, or it does not fit the base.
    """
    _check_adapter(directory)
    ours = (directory / _OURS).exists()
    try:
        delta = lora.load(directory, base) if ours else lora.peft.load(directory, base, names)
    except (OSError, ValueError) as error:
        if not ours and (apart := re.search(r"^ *tied: (.*?), so that", str(error), re.MULTILINE)):
            raise UserError(
                f"--init-from {directory}: {apart[1]}, but head and embedding of this model are one weight; merge the "
                "adapter with `lora-jax merge`, which stores both, and train on the merged model (--model)"
            ) from None
        raise UserError(
            f"--init-from: {error}" if str(directory) in str(error) else f"--init-from {directory}: {error}"
        ) from None
    train, frozen = lora.partition(delta)
    return lora.join(jax.tree.map(lambda leaf: leaf.astype(dtype), train), frozen)


def _check_adapter(directory: Path) -> None:
    """Raises `UserError` where a directory holds no adapter."""
    if any((directory / name).exists() for name in (_OURS, _PEFT)):
        return
    if not directory.is_dir():
        raise UserError(f"--init-from {directory}: is no directory")
    inside = [entry for entry in sorted(directory.iterdir()) if any((entry / name).exists() for name in (_OURS, _PEFT))]
    hint = f"; adapters are in {', '.join(map(str, inside))}" if inside else ""
    raise UserError(f"--init-from {directory}: expected {_OURS} (lora_jax) or {_PEFT} (PEFT) in it{hint}")


def check(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config.

    Raises:
      UserError: There are other devices than it has, the batch or a sequence cannot be divided over it, or there is
        no adapter to start from.
    """
    if config.init_from is not None:
        _check_adapter(config.init_from)
    mesh = meshes.make_mesh(config.mesh, devices)
    meshes.check_batch(config.batch.global_, config.mesh, "batch.global", accumulate=config.batch.accumulate)
    if config.mesh.sequence and config.length % config.mesh.tensor:
        fits = meshes.nearest_fits(config.length, lambda n: n % config.mesh.tensor == 0)
        raise UserError(
            f"length {config.length} cannot be divided over mesh.tensor {config.mesh.tensor}, which mesh.sequence asks "
            f"for; nearest that can: {' and '.join(map(str, fits))}"
        )
    return mesh


def _check_heads(config: Config, shape: Any) -> None:
    heads, tensor = getattr(shape, "num_key_value_heads", None) or shape.n_head, config.mesh.tensor
    if heads % tensor:
        fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise UserError(f"mesh.tensor {tensor} does not divide the {heads} heads of keys of {config.model}; {fits} do")


def described(model: str) -> Mapping[str, Any]:
    """The `config.json` of a model that is here, or whose shape is shipped."""
    return shapes.read(model) if shapes.has(model) else checkpoint.read_config(location.find(model))


def options_of(config: Config, platform: Platform | None) -> Options:
    """How the model computes."""
    kernel = config.attention
    if kernel == "auto":
        kernel = "flash" if (platform or jax.default_backend()) == "tpu" and config.length % 128 == 0 else "xla"
    return Options(
        scan=True,
        remat=config.remat,
        dtype=jnp.dtype(config.dtype),
        attention=kernel,
        platform=platform,
        shards=config.mesh.shards,
        loss_chunk=config.loss_chunk,
    )


def rules_of(config: Config) -> dict[str, Format | None]:
    """The format of each weight that is quantized."""
    formats = {"none": None, "nf4": lora.NF4(), "int8": lora.Int8()}
    found = formats[config.quantize]
    return {} if found is None else {"|".join(LINEAR.values()): found}


def spec_of(config: Config, base: Any) -> dict[str, Any]:
    """The recipe of each weight that is adapted.

    Raises:
      UserError: A pattern of `ranks` decides no weight's rank.
    """
    recipe = {"lora": lora.LoRA, "dora": lora.DoRA}[config.method]
    dtype = jnp.dtype(config.adapter_dtype)

    def ranked(rank: int) -> Any:
        return recipe(rank, config.alpha, dropout=config.dropout, dtype=dtype)

    targets = [(LINEAR | OTHERS)[target] for target in config.targets]
    patterns = config.rank_patterns()
    if not patterns:
        return {target: ranked(config.rank) for target in targets}
    adapted = [path for path in paths.flatten(base).paths if any(re.search(target, path) for target in targets)]
    first = {path: next((one for one in patterns if re.search(one, path)), None) for path in adapted}
    for pattern in patterns:
        if pattern not in first.values():
            earlier = any(re.search(pattern, path) for path in adapted)
            why = "matches only weights that an earlier pattern matches" if earlier else "matches no adapted weight"
            raise UserError(f"ranks: {pattern!r} {why}; these are adapted: {', '.join(adapted)}")
    exact = {f"^{re.escape(path)}$": patterns[pattern] if pattern else config.rank for path, pattern in first.items()}
    nothing = [target for target in targets if not any(re.search(target, path) for path in adapted)]
    return {path: ranked(rank) for path, rank in exact.items()} | {target: ranked(config.rank) for target in nothing}


def _base(config: Config, base: Any, apply: Callable, sharding: Callable) -> Any:
    """The shapes of the weights as they are read: in the config's dtype, some of them quantized, on the mesh."""
    rules = rules_of(config)
    plan = Plan.of(base, rules, apply, _example(config)) if rules else None

    def leaf(path: str, weight: Any) -> Any:
        where = sharding(path, weight.shape)
        weight = jax.ShapeDtypeStruct(weight.shape, jnp.dtype(config.dtype), sharding=where)
        if plan is None or path not in plan.chosen:
            return weight
        made = jax.eval_shape(lambda weight: plan(path, weight), weight)
        try:
            return placed(made, shardings(made, where))
        except ValueError as error:
            raise UserError(f"quantize {config.quantize}: {error}") from None

    return gathered(paths.flatten(base).map(leaf), meshes.FSDP)


def _has_dropout(delta: Any) -> bool:
    """Whether an adapter has a dropout rate above 0; None, for a new one, has none."""
    rates = [getattr(adapter, "dropout", None) for adapter in (delta or {}).values()]
    return any(rate is not None and np.any(np.asarray(rate) > 0) for rate in rates)


def _loss(apply: Callable, config: Config, *, drops: bool) -> Callable:
    """For the library's train step: the loss summed over a batch's labels, and how many they are.

    Without a key, as in evaluation, there is no dropout, noise or label smoothing.
    """
    adapted = lora.adapt(apply, flatten=not config.mesh.sequence)

    def loss(base: Any, delta: Any, batch: Any, key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        options: dict[str, Any] = {}
        if key is not None:
            dropout_key, noise_key = jax.random.split(key)
            options["dropout_key"] = dropout_key if drops else None
            options["label_smoothing"] = config.label_smoothing
            if config.neftune:
                options["noise"] = (noise_key, config.neftune)
        losses = adapted(
            base,
            delta,
            batch["tokens"],
            batch["segments"],
            batch["positions"],
            labels_BL=batch["labels"],
            **options,
        )
        return jnp.sum(losses), jnp.sum(batch["labels"] >= 0)

    return loss


def _example(config: Config) -> jax.ShapeDtypeStruct:
    """Tokens that a model is traced with."""
    return jax.ShapeDtypeStruct((config.batch.global_ // config.batch.accumulate, config.length), jnp.int32)


def placed(tree: Any, shardings: Any) -> Any:
    """Shapes with their shardings."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), tree, shardings
    )
