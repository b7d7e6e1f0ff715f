"""A small model with a step to compare: layers of a scan and a head, in forms for meshes of both kinds."""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from quantized_bases import quantize

import lora_jax as lora
from lora_jax import paths

# No mesh divides the rank, and nothing else is 5 long: what has a 5 in its shape is of the delta, or x·a.
WIDTH, HIDDEN, LAYERS, OUTPUTS, RANK = 128, 192, 3, 8, 5
BATCH, LENGTH = 8, 16


def normal(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape) / math.sqrt(shape[-2])


BASE = {
    "layers": {"up": normal(0, LAYERS, WIDTH, HIDDEN), "down": normal(1, LAYERS, HIDDEN, WIDTH)},
    "head": normal(2, WIDTH, OUTPUTS),
}
X = jax.random.normal(jax.random.key(3), (BATCH, LENGTH, WIDTH))
WHOLE = P(None, None)
SPEC = {"layers": lora.LoRA(RANK, alpha=8), "head": lora.Full()}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where everything is on a mesh.

    Attributes:
      sizes: Devices along each axis of the mesh.
      tokens: The inputs and what passes between layers, `[batch, length, width]`.
      hidden: What is inside of a layer.
      up, down, head: The weights, without the axis of layers.
      used: Up and down where a product takes them: FSDP's axis is gathered.
    """

    sizes: dict[str, int]
    tokens: P
    hidden: P
    up: P = WHOLE
    down: P = WHOLE
    head: P = WHOLE
    used: tuple[P, P] = (WHOLE, WHOLE)

    def mesh(self, axis_type: AxisType = AxisType.Auto) -> Mesh:
        return jax.make_mesh(tuple(self.sizes.values()), tuple(self.sizes), axis_types=(axis_type,) * len(self.sizes))

    def weights(self, mesh: Mesh) -> Any:
        """The sharding of each weight of the base."""
        specs = {"layers/up": P(None, *self.up), "layers/down": P(None, *self.down), "head": self.head}
        return paths.flatten(BASE).map(lambda path, _: NamedSharding(mesh, specs[path]))


def three(data: int, fsdp: int, tensor: int) -> Layout:
    """Data, FSDP and tensor parallelism together."""
    examples = ("data", "fsdp")
    return Layout(
        sizes={"data": data, "fsdp": fsdp, "tensor": tensor},
        tokens=P(examples, None, None),
        hidden=P(examples, None, "tensor"),
        up=P("fsdp", "tensor"),
        down=P("tensor", "fsdp"),
        head=P("fsdp", None),
        used=(P(None, "tensor"), P("tensor", None)),
    )


BY_TENSOR = {"up": P(None, "tensor"), "down": P("tensor", None), "used": (P(None, "tensor"), P("tensor", None))}
SEQUENCES = {
    "sequence": Layout({"sequence": 8}, P(None, "sequence", None), P(None, "sequence", None)),
    "data_sequence": Layout({"data": 2, "sequence": 4}, P("data", "sequence", None), P("data", "sequence", None)),
    "data_sequence_tensor": Layout(
        {"data": 2, "sequence": 2, "tensor": 2},
        P("data", "sequence", None),
        P("data", "sequence", "tensor"),
        **BY_TENSOR,
    ),
    # Between layers tokens are divided, inside of them the width is: each layer gathers its input.
    "over_tensor": Layout({"data": 2, "tensor": 4}, P("data", "tensor", None), P("data", None, "tensor"), **BY_TENSOR),
}
MIXES = {  # each recipe where the axis that it sums over is divided, and where it is not
    "LoRA_Full": SPEC,
    "DoRA_VeRA_Full": {"up": lora.DoRA(RANK), "down": lora.VeRA(RANK), "head": lora.Full()},
    "blocks_LoKr_IA3": {"up": lora.LoRA(RANK, blocks=2), "down": lora.LoKr(RANK), "head": lora.IA3()},
    "DVoRA_blocks_LoRAFA": {"up": lora.DVoRA(RANK), "down": lora.LoRA(RANK, blocks=2), "head": lora.LoRAFA(RANK)},
    "biases": {"up": lora.LoRA(RANK), "down": lora.LoRA(RANK, blocks=2), "head": lora.LoRAFA(RANK)},
    "AdaLoRA_DoRA_LoRA": {"up": lora.AdaLoRA(RANK), "down": lora.DoRA(RANK), "head": lora.LoRA(RANK)},
}


def model(layout: Layout | None = None, mesh: Mesh | None = None, *, remat: bool = False) -> Callable:
    """The function of (base, x): as it is, with constraints for a mesh of automatic axes, or for one of explicit axes.

    Where the partitioner has to be told and where JAX refuses to guess are the same three places.
    """
    explicit = mesh is not None and AxisType.Explicit in mesh.axis_types

    def product(equation: str, x: jax.Array, weight: jax.Array, used: int, to: str) -> jax.Array:
        if layout is None or mesh is None:
            return jnp.einsum(equation, x, weight)
        if explicit:
            weight = jax.reshard(weight, layout.used[used])
            return jnp.einsum(equation, x, weight, out_sharding=getattr(layout, to))
        sharding = NamedSharding(mesh, getattr(layout, to))
        return jax.lax.with_sharding_constraint(jnp.einsum(equation, x, weight), sharding)

    def fn(base, x):
        def body(x, layer):
            hidden = jnp.tanh(product("btd,df->btf", x, layer["up"], 0, "hidden"))
            return x + product("btf,fd->btd", hidden, layer["down"], 1, "tokens"), None

        x = jax.lax.scan(jax.checkpoint(body) if remat else body, x, base["layers"])[0]
        return x @ (jax.reshard(base["head"], WHOLE) if explicit else base["head"])

    return fn


def started(mix: str = "LoRA_Full", form: Any = None) -> tuple[Any, Any]:
    """The base, in a format, and a delta of it that changes something."""
    base = BASE if form is None else quantize(BASE, {"layers": form}, model(), X)
    delta = lora.init(jax.random.key(0), base, MIXES[mix], model(), X)
    if mix == "biases":
        delta = {path: dataclasses.replace(node, bias=node.b[..., 0, :]) for path, node in delta.items()}
    train, frozen = lora.partition(delta)
    moved = jax.tree.map(lambda leaf: leaf + 0.02 * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), train)
    return base, lora.join(moved, frozen)


@dataclasses.dataclass(frozen=True)
class Trained:
    """What two steps gave: the losses, the state after them, and the text of the compiled step."""

    losses: list[float]
    state: lora.TrainState
    text: str


TX = optax.sgd(0.1, momentum=0.9)


def step_of(fn: Callable, *, flatten: bool = True, **options: Any) -> Any:
    adapted = lora.adapt(fn, flatten=flatten)
    return lora.train_step(lambda base, delta, x, key: jnp.mean((adapted(base, delta, x) - 1.0) ** 2), TX, **options)


def text_of(fn: Callable, base: Any, delta: Any, x: jax.Array, *, flatten: bool = True) -> str:
    """The compiled step, not run."""
    state = lora.TrainState.create(base, delta, TX, jax.random.key(1))
    return step_of(fn, flatten=flatten).lower(state, x).compile().as_text()


def trained(fn: Callable, base: Any, delta: Any, x: jax.Array, **options: Any) -> Trained:
    step, state = step_of(fn, **options), lora.TrainState.create(base, delta, TX, jax.random.key(1))
    losses = []
    with Compilations() as compiled:
        text = step.lower(state, x).compile().as_text()
        for _ in range(2):
            state, metrics = step(state, x)
            losses.append(float(metrics["loss"]))
    assert compiled.count == 1, "the state does not lie where the first step found it"
    return Trained(losses, state, text)


@functools.cache
def alone(mix: str = "LoRA_Full", form: Any = None) -> Trained:
    """On one device."""
    return trained(model(), *started(mix, form), X)


class Compilations(logging.Handler):
    """Counts the times that a training step is compiled while it is entered."""

    def __enter__(self) -> "Compilations":
        self.count, self.logging = 0, jax.log_compiles()
        self.logging.__enter__()
        logging.getLogger("jax").addHandler(self)
        return self

    def __exit__(self, *error: Any) -> None:
        logging.getLogger("jax").removeHandler(self)
        self.logging.__exit__(*error)

    def emit(self, record: logging.LogRecord) -> None:
        self.count += bool(re.match(r"Compiling \w+\(body\)", record.getMessage()))


def placed(layout: Layout, mesh: Mesh, base: Any, delta: Any) -> tuple[Any, Any, jax.Array]:
    """The base, the delta and the inputs on a mesh."""
    state = lora.TrainState.create(base, delta, TX, jax.random.key(1))
    shardings = lora.sharding.state_shardings(layout.weights(mesh), state, TX)
    x = jax.device_put(X, NamedSharding(mesh, layout.tokens))
    return jax.device_put(base, shardings.base), jax.device_put(delta, shardings.delta), x


def assert_same(got: Trained, expected: Trained) -> None:
    """To 1e-5: the losses, and every array of the delta, in parts of its largest element."""
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    for (keys, one), other in zip(
        jax.tree_util.tree_leaves_with_path(got.state.delta), jax.tree.leaves(expected.state.delta), strict=True
    ):
        limit = 1e-5 * float(jnp.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=limit, err_msg=jax.tree_util.keystr(keys))


def assert_at_home(state: lora.TrainState, layout: Layout, mesh: Mesh) -> None:
    """All of the state lies where state_shardings says."""
    shardings = lora.sharding.state_shardings(layout.weights(mesh), state, TX)
    for (keys, leaf), to in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(to, leaf.ndim), jax.tree_util.keystr(keys)
