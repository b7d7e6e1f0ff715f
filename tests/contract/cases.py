"""The factors of the contract suite, which combinations make sense, and how a case is built."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from quantized_bases import FORMATS, quantize

import lora_jax as lora
from contract.layers import LAYERS
from contract.throwaway import BlockedRecipe, FrozenPairRecipe, PickedRecipe
from lora_jax import paths

RECIPES = {
    "LoRA": lambda axes=None: lora.LoRA(2, alpha=4, axes=axes),
    "rsLoRA_bfloat16": lambda axes=None: lora.LoRA(
        2, alpha=3, scaling="alpha/sqrt(r)", init="gaussian", dtype=jnp.bfloat16, axes=axes
    ),
    "LoRA_blocks": lambda axes=None: lora.LoRA(1, alpha=2, blocks=2, axes=axes),
    "LoRA_one_block": lambda axes=None: lora.LoRA(1, alpha=2, blocks=(False, True), axes=axes),
    "DoRA": lambda axes=None: lora.DoRA(2, alpha=4, axes=axes),
    "Full": lambda axes=None: lora.Full(),
    "Rows": lambda axes=None: lora.Rows((0, 2), axes=axes),
    "DoRA_inputs": lambda axes=None: lora.DoRA(2, alpha=4, norm_over="out", axes=axes),
    "LoRAFA": lambda axes=None: lora.LoRAFA(2, alpha=4, init="gaussian", axes=axes),
    "AdaLoRA": lambda axes=None: lora.AdaLoRA(2, alpha=4, axes=axes),
    "VeRA": lambda axes=None: lora.VeRA(3, axes=axes),
    "DVoRA": lambda axes=None: lora.DVoRA(3, axes=axes),
    "LoHa": lambda axes=None: lora.LoHa(1, alpha=2, axes=axes),
    "LoKr": lambda axes=None: lora.LoKr(1, alpha=2, axes=axes),
    "IA3": lambda axes=None: lora.IA3(axes=axes),
    "IA3_inputs": lambda axes=None: lora.IA3("in", axes=axes),
    "HiRA": lambda axes=None: lora.HiRA(2, axes=axes),
    "LoRAXS": lambda axes=None: lora.LoRAXS(2, alpha=4, axes=axes),
    "MiSS": lambda axes=None: lora.MiSS(2, axes=axes),
    "OFT": lambda axes=None: lora.OFT(2, axes=axes),
    "Bottleneck": lambda axes=None: lora.Bottleneck(3, "gelu", axes=axes),
    "Bottleneck_norm": lambda axes=None: lora.Bottleneck(3, "tanh", norm=True, axes=axes),
    "FrozenPair": FrozenPairRecipe,
    "Picked": PickedRecipe,
    "Blocked": BlockedRecipe,
}

EVERYWHERE = ("LoRA", "LoRA_blocks", "DoRA", "Full", "Rows")
"""Recipes that meet every layer: between them they have all that a factored form may hold. The others meet some."""

SOME = (
    "linen.DenseGeneral",
    "linen.Conv2d_strided",
    "linen.Conv2d_grouped_dilated",
    "linen.Embed_tied_attend",
    "linen.scan",
    "nnx.Embed",
    "nnx.MultiHeadAttention",
    "equinox.MLP",
    "raw.x_w",
    "raw.w_x",
    "raw.ragged_dot",
    "raw.reshaped_to_heads",
    "raw.scan_over_layers",
    "raw.twice",
)
"""A layer of each form that a use of a weight may have."""

NONLINEAR = ("Bottleneck", "Bottleneck_norm")
"""Recipes whose adapters are functions of a layer's output, which no merged weight holds."""

ONE_PRODUCT = (
    "linen.Conv2d_grouped_dilated",
    "linen.Conv2d_strided",
    "linen.Dense",
    "linen.DenseGeneral",
    "linen.vmap",
    "nnx.Conv",
    "nnx.LinearGeneral",
    "equinox.Linear",
    "haiku.Linear",
    "raw.experts",
    "raw.jit_in_jit",
    "raw.x_w",
    "raw.x_wT",
)
"""Layers that return the output of one product, with the out axes last, so that these can be applied to it."""

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16} | dict.fromkeys(FORMATS, jnp.float32)
"""Of everything in a case; with a format the adapted weights are quantized, and everything else is float32."""

TRANSFORMATIONS = ("plain", "jit", "grad", "jvp", "vmap", "scan", "remat", "pmap", "shard_map")

FACTORS = {
    "layer": tuple(LAYERS),
    "recipe": tuple(RECIPES),
    "dtype": tuple(DTYPES),
    "transformation": TRANSFORMATIONS,
}

USES_DEVICES = ("raw.sharding_constraint", "raw.shard_map", "raw.shard_map_gathered")
"""Layers that span the devices themselves, so that no transformation can spread them over devices again."""


DIVIDED = ("LoKr", "MiSS", "OFT")
"""Recipes that divide an axis."""

CONVOLUTIONS = ("linen.Conv2d_strided", "linen.Conv2d_grouped_dilated")
MERGED = (
    # A part of a table is computed before it is added to something.
    *itertools.product(("raw.positions",), EVERYWHERE),
    # Axes in blocks or divided have no ragged product of their own, and no lookup.
    *itertools.product(("raw.ragged_dot",), ("LoRA_blocks", "LoRA_one_block", "Blocked", *DIVIDED)),
    *itertools.product(("nnx.Embed", "linen.Embed_tied_attend"), DIVIDED),
    # Gains on the in axes of a convolution are on its window too; a divided kernel is no kernel.
    *itertools.product(CONVOLUTIONS, ("DoRA_inputs", "IA3_inputs", *DIVIDED)),
)
"""What is merged, and explain says so."""

ODD = ("linen.Conv2d_grouped_dilated", "linen.Embed_tied_attend", "nnx.Embed")
"""Layers whose largest in axis is of odd size."""

IN_PARTS = (*USES_DEVICES, "raw.qkv_split_before", "raw.qkv_sliced_before")
"""Layers that multiply by parts of their weight, so that even a merged gradient is made of parts."""

DIVIDED_IN_PARTS = "raw.reshaped_to_heads"
"""The same of recipes that divide an axis."""


def fits(layer: str, recipe: str) -> bool:
    """Whether a recipe can adapt a layer's weights. (All out axes that may be split are of even size.)"""
    if recipe in NONLINEAR:
        return layer in ONE_PRODUCT
    if recipe not in EVERYWHERE and layer not in SOME:
        return False
    roles = LAYERS[layer].axes.values()
    if recipe in ("LoRA_blocks", "LoRA_one_block"):
        return all(axes.count("out") == 1 for axes in roles)
    if recipe in ("MiSS", "OFT"):
        return layer not in ODD
    if recipe == "Rows":
        return all(axes.count("in") == 1 and "batch" not in axes for axes in roles)
    return True


def allowed(layer: str, recipe: str, dtype: str, transformation: str) -> bool:
    if layer == "raw.while_decode" and transformation in ("grad", "remat"):
        return False  # JAX has no reverse mode for while
    if layer in USES_DEVICES and transformation in ("pmap", "shard_map", "vmap", "scan"):
        return False
    return fits(layer, recipe)


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer with its adapters.

    Attributes:
      layer: Its name.
      fn: The function of parameters.
      base: Its parameters; may hold leaves that are no arrays, and quantized ones.
      args: Its other arguments.
      fresh: The delta before training.
      delta: The delta with every trained leaf moved.
      other: Moved otherwise.
      axes: The roles that the trace should find.
      wide: The same case with every value as float32, which both forms of a bfloat16 case round; itself in float32.
      factored: Whether the adapters should be applied without a merge.
      in_parts: Whether a gradient through merged weights has no product of a weight's shape either.
      forward_mode: Whether the function can be differentiated forwards.
      tolerance: Relative to the largest value.
    """

    layer: str
    fn: Callable
    base: Any
    args: tuple
    fresh: dict
    delta: dict
    other: dict
    axes: dict[str, tuple[str, ...]]
    factored: bool
    in_parts: bool
    forward_mode: bool
    tolerance: float
    wide: "Case | None" = None

    @property
    def plain(self) -> Any:
        """The parameters as the function takes them."""
        return lora.dequantize(self.base)

    def merged(self, delta: dict) -> jax.Array:
        """The output with merged weights; with an adapter that no weight holds, what it makes of the base's output."""
        (node, *_) = delta.values()
        if node.nonlinear:
            return bottleneck(node, self.fn(self.plain, *self.args))
        return self.fn(lora.merge(self.base, delta), *self.args)


@functools.lru_cache(maxsize=4)
def build_layer(layer: str, dtype: str) -> tuple[Callable, Any, tuple]:
    """A layer's function, parameters and arguments; consecutive cases share them."""
    return LAYERS[layer].make(DTYPES[dtype])


def build(layer: str, recipe: str, dtype: str) -> Case:
    definition = LAYERS[layer]
    fn, base, args = build_layer(layer, dtype)
    if dtype in FORMATS:
        rules = {
            f"^{path}$": dataclasses.replace(FORMATS[dtype], axes=axes if definition.merged else None)
            for path, axes in definition.axes.items()
        }
        base = quantize(base, rules, fn, *args)
    # Where a custom derivative rule hides the product, the trace tells no roles and the user gives them.
    spec = {
        f"^{path}$": RECIPES[recipe](axes=axes if definition.merged else None) for path, axes in definition.axes.items()
    }
    fresh = lora.init(jax.random.key(1), base, spec, fn, *args)
    case = Case(
        layer=layer,
        fn=fn,
        base=base,
        args=args,
        fresh=fresh,
        delta=moved(fresh, 2),
        other=moved(fresh, 3),
        axes=definition.axes,
        factored=not definition.merged and recipe not in ("Full", "HiRA") and (layer, recipe) not in MERGED,
        in_parts=recipe in NONLINEAR or layer in IN_PARTS or (layer == DIVIDED_IN_PARTS and recipe in DIVIDED),
        forward_mode=layer != "raw.custom_vjp",
        # bfloat16 has 8 bits, and a layer is several products and sums.
        tolerance=5e-2 if "bfloat16" in (dtype, *recipe.split("_")) else 2e-5,
    )
    if dtype != "bfloat16":
        return case
    fn, _, _ = build_layer(layer, "float32")
    values = widened({name: getattr(case, name) for name in ("base", "args", "fresh", "delta", "other")})
    return dataclasses.replace(case, wide=dataclasses.replace(case, fn=fn, **values))


def bottleneck(node, y):
    """A bottleneck after a layer's output, whose batch axes are first and whose out axes are last."""
    lead, count = node.axes.count("batch"), node.axes.count("out")
    flat = y.reshape(*y.shape[:lead], -1, math.prod(y.shape[-count:]))
    down, up = (array.astype(y.dtype).reshape(*array.shape[: lead + 1], -1) for array in (node.down, node.up))

    def row(array):
        return array.astype(y.dtype).reshape(*y.shape[:lead], 1, -1)

    inner = flat
    if node.norm_scale is not None:
        wide = flat.astype(jnp.float32)
        normal = (wide - wide.mean(-1, keepdims=True)) / jnp.sqrt(wide.var(-1, keepdims=True) + 1e-5)
        inner = normal.astype(y.dtype) * row(node.norm_scale) + row(node.norm_bias)
    activation = {"gelu": lambda x: jax.nn.gelu(x, approximate=False), "tanh": jnp.tanh}[node.activation]
    hidden = activation(jnp.matmul(inner, down.mT) + row(node.down_bias))
    return (flat + (jnp.matmul(hidden, up) + row(node.up_bias))).reshape(y.shape)


def widened(tree):
    """The tree with its narrow floats as float32."""

    def widen(leaf):
        narrow = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4
        return leaf.astype(jnp.float32) if narrow else leaf

    return jax.tree.map(widen, tree)


def weight(base, path):
    return paths.flatten(base).as_dict()[path]


def moved(delta, seed):
    """The delta after some training: every trained leaf is another."""
    train, frozen = lora.partition(delta)
    random = np.random.default_rng(seed)

    def move(leaf):
        # By NumPy: JAX would compile a program for each shape.
        values = np.asarray(leaf, np.float32) + 0.3 * random.standard_normal(leaf.shape)
        return jnp.asarray(values.astype(leaf.dtype))

    return lora.join(jax.tree.map(move, train), frozen)
