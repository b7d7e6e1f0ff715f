"""The training steps of the memory benchmark, for shapes or for arrays, as `lora.train_step` makes them."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

import lora_jax as lora
from experiments.benchmarks.memory_arithmetic import Problem
from experiments.models.llama import Llama, LlamaConfig
from experiments.models.options import Options, Platform
from lora_jax.quantization import Quantized

KERNELS = r"^layers/.*/kernel$"
"""The paths of the linear layers of all blocks: what is adapted, and what is quantized."""

LARGE = 100_000
"""Elements from which on a leaf of the optimizer's state goes to the host."""

FLOATS = {2: jnp.bfloat16, 4: jnp.float32}


@dataclasses.dataclass(frozen=True)
class Made:
    """A step and the shapes of what it takes.

    Attributes:
      step: From `lora.train_step`.
      state: Its state.
      batch: Its batch.
    """

    step: Any
    state: lora.TrainState
    batch: Any

    def lower(self) -> jax.stages.Lowered:
        return self.step.lower(self.state, self.batch)

    def parts(self) -> dict[str, Any]:
        """What the step is given, by name. In full fine-tuning the delta is the parameters."""
        state = self.state
        base, delta = (state.base, state.delta) if jax.tree.leaves(state.base) else (state.delta, {})
        return {"base": base, "delta": delta, "optimizer": state.opt_state}


def only(device: Any) -> Sharding:
    """Everything on one device; with a SingleDeviceSharding XLA refuses state that goes back to the host (E1200)."""
    return NamedSharding(Mesh(np.array([device]), ("device",)), PartitionSpec())


def make(problem: Problem, sharding: Sharding, platform: Platform, ballast: int = 0) -> Made:
    """The step of a problem.

    Args:
      problem: What is trained.
      sharding: Where everything is.
      platform: Of its devices.
      ballast: Bytes of an argument that does nothing: so much of the device is not there for the step.
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
    tx = float32_moments(optax.adamw(1e-4))
    if problem.on_host:
        tx = lora.optim.host_offloaded(tx, min_size=LARGE)

    def create(key: jax.Array, base: Any) -> lora.TrainState:
        delta = lora.init(key, base, spec, apply, tokens)
        state = lora.TrainState.create(base, delta, tx, key)
        # What is trained outright replaces the base, which nothing needs then.
        return state.replace(base={}) if problem.method == "full" else state

    state = jax.eval_shape(create, jax.eval_shape(lambda: jax.random.key(0)), base)
    batch: Any = tokens
    if ballast:
        batch = (tokens, jax.ShapeDtypeStruct((16, ballast // 64 // 1024 * 1024), jnp.float32))
    state, batch = _placed((state, batch), sharding)
    if problem.on_host:
        host = sharding.with_memory_kind("pinned_host")
        moved = jax.tree.map(lambda leaf: _placed(leaf, host if leaf.size >= LARGE else sharding), state.opt_state)
        state = dataclasses.replace(state, opt_state=moved)
    return Made(lora.train_step(_loss(problem, losses), tx), state, batch)


def _loss(problem: Problem, losses: Callable) -> Callable:
    """The loss of (base, delta, batch, key)."""
    adapted = lora.adapt(losses)

    def full(base, delta, batch, key):
        return jnp.mean(losses(lora.nnx.nested({path: node.value for path, node in delta.items()}), batch))

    def factored(base, delta, batch, key):
        return jnp.mean(adapted(lora.dequantize(base) if problem.plain else base, delta, batch))

    function = full if problem.method == "full" else factored

    def loss(base, delta, batch, key):
        tokens, *ballast = batch if isinstance(batch, tuple) else (batch,)
        return sum((extra[0, 0] for extra in ballast), function(base, delta, tokens, key))

    return loss


def float32_moments(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """The transform with its state, and its arithmetic, in float32 whatever the parameters are in."""

    def wide(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    return optax.GradientTransformation(
        lambda params: tx.init(wide(params)),
        lambda updates, state, params=None: tx.update(wide(updates), state, wide(params)),
    )


def filled(shapes: Any) -> Any:
    """Arrays of these shapes, in buffers of their own and written to, so that the memory is really taken.

    Scalars, such as an adapter's rate of dropout, are zero.
    """

    def fill(leaf: Any) -> jax.Array:
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), leaf.sharding)
        value = 1 if not jnp.issubdtype(leaf.dtype, jnp.floating) else 1e-2 if leaf.ndim else 0
        array = jax.jit(lambda: jnp.full(leaf.shape, value, leaf.dtype))()
        return jax.device_put(array, leaf.sharding)

    return jax.block_until_ready(jax.tree.map(fill, shapes))


def quantized(base: Any) -> list[Quantized]:
    """The quantized leaves of a base."""
    leaves = jax.tree.leaves(base, is_leaf=lambda node: isinstance(node, Quantized))
    return [leaf for leaf in leaves if isinstance(leaf, Quantized)]


def _placed(tree: Any, sharding: Sharding) -> Any:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
