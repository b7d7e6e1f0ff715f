"""The training steps of the memory benchmark, built by `lora.train_step` for shapes or arrays."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

import lora_jax as lora
from experiments.benchmarks.memory_arithmetic import Problem
from experiments.models.llama import Llama, LlamaConfig
from experiments.models.options import Options, Platform
from lora_jax.quantization import Quantized

KERNELS = r"^layers/.*/kernel$"
"""The paths of the linear layers of all blocks, which are adapted and quantized."""

LARGE = 100_000
"""The minimum number of elements of a leaf of the optimizer's state in the host's memory."""

_OPTIMIZERS = {"adam": optax.adamw(1e-4), "momentum": optax.sgd(1e-4, momentum=0.9), "sgd": optax.sgd(1e-4)}

FLOATS = {2: jnp.bfloat16, 4: jnp.float32}


@dataclasses.dataclass(frozen=True)
class Step:
    """A step and the shapes of its arguments.

    Attributes:
      step: The result of `lora.train_step`.
      state: The shapes of its state.
      batch: The shapes of its batch.
    """

    step: Any
    state: lora.TrainState
    batch: Any

    def lower(self) -> jax.stages.Lowered:
        return self.step.lower(self.state, self.batch)

    def parts(self) -> dict[str, Any]:
        """Returns the step's arguments by name. In full fine-tuning the delta holds the parameters."""
        state = self.state
        base, delta = (state.base, state.delta) if jax.tree.leaves(state.base) else (state.delta, {})
        return {"base": base, "delta": delta, "optimizer": state.opt_state}


def on_device(device: Any) -> Sharding:
    """Returns the sharding of arrays on a device; with a SingleDeviceSharding XLA rejects state on the host (E1200)."""
    return NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())


def make_step(problem: Problem, sharding: Sharding, platform: Platform, ballast: int = 0) -> Step:
    """Returns the step of a problem.

    Args:
      problem: The model and the method.
      sharding: The sharding of all arrays.
      platform: The platform of its devices.
      ballast: Bytes of an unused argument, which reduces the memory that is available to the step.
    """
    shape, dtype = problem.shape, FLOATS[problem.bytes]
    config = LlamaConfig.from_json(
        {
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.width,
            "intermediate_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
        }
    )
    options = Options(scan=True, remat="full", dtype=dtype, platform=platform, loss_chunk=problem.tokens)
    apply, base = lora.nnx.functional(nnx.eval_shape(lambda: Llama(config, options, rngs=nnx.Rngs(0))))
    base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), base)
    tokens = jax.ShapeDtypeStruct((1, problem.tokens), jnp.int32)

    def losses(base: Any, tokens: jax.Array) -> jax.Array:
        return apply(base, tokens, labels_BL=tokens)

    spec: dict[str, Any] = {KERNELS: lora.LoRA(problem.rank, dtype=FLOATS[problem.adapter_bytes])}
    if problem.method == "full":
        spec = {"": lora.Full(dtype=dtype)}
    elif problem.method == "qlora":
        base = lora.quantize(base, {KERNELS: lora.NF4()}, apply, tokens)
    tx = float32_moments(_OPTIMIZERS[problem.optimizer])
    if problem.on_host:
        tx = lora.optim.host_offloaded(tx, min_size=LARGE)

    def create(key: jax.Array, base: Any) -> lora.TrainState:
        delta = lora.init(key, base, spec, apply, tokens)
        state = lora.TrainState.create(base, delta, tx, key)
        # Parameters that are trained in full replace the base.
        return state.replace(base={}) if problem.method == "full" else state

    state = jax.eval_shape(create, jax.eval_shape(lambda: jax.random.key(0)), base)
    batch: Any = tokens
    if ballast:
        batch = (tokens, jax.ShapeDtypeStruct((16, ballast // 64 // 1024 * 1024), jnp.float32))
    state, batch = _with_sharding((state, batch), sharding)
    if problem.on_host:
        host = sharding.with_memory_kind("pinned_host")
        opt_state = jax.tree.map(
            lambda leaf: _with_sharding(leaf, host if leaf.size >= LARGE else sharding), state.opt_state
        )
        state = dataclasses.replace(state, opt_state=opt_state)
    return Step(lora.train_step(_loss(problem, losses), tx), state, batch)


def _loss(problem: Problem, losses: Callable) -> Callable:
    """The loss of (base, delta, batch, key)."""
    adapted = lora.adapt(losses)

    def full(base, delta, batch, key):
        values = {tuple(path.split("/")): node.value for path, node in delta.items()}
        return jnp.mean(losses(traverse_util.unflatten_dict(values), batch))

    def factored(base, delta, batch, key):
        return jnp.mean(adapted(lora.dequantize(base) if problem.plain else base, delta, batch))

    function = full if problem.method == "full" else factored

    def loss(base, delta, batch, key):
        tokens, *ballast = batch if isinstance(batch, tuple) else (batch,)
        return sum((extra[0, 0] for extra in ballast), function(base, delta, tokens, key))

    return loss


def float32_moments(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the transform with float32 state and arithmetic for parameters of any dtype."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: tx.init(wide(params)),
        lambda updates, state, params=None: tx.update(wide(updates), state, wide(params)),
    )


def fill(shapes: Any) -> Any:
    """Returns arrays of the given shapes in separate buffers that are written, so that the memory is allocated.

    Scalars, such as an adapter's dropout rate, are zero.
    """

    def fill_leaf(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), leaf.sharding)
        value = 1 if not jnp.issubdtype(leaf.dtype, jnp.floating) else 1e-2 if leaf.ndim else 0
        array = jax.jit(lambda: jnp.full(leaf.shape, value, leaf.dtype))()
        return jax.device_put(array, leaf.sharding)

    return jax.block_until_ready(jax.tree.map(fill_leaf, shapes))


def quantized_leaves(base: Any) -> list[Quantized]:
    """Returns the quantized leaves of a base."""
    leaves = jax.tree.leaves(base, is_leaf=lambda node: isinstance(node, Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def _with_sharding(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
