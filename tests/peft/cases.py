"""The fixtures of `tests/fixtures/peft` as functions of JAX arrays, with the names of their leaves in PyTorch.

A function takes a flat dict of leaves and the inputs in torch's layout, and gives the output in torch's
layout. One fixture may serve several ways to hold its weights.
"""

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file

from lora_jax.peft import CONV1D, CONV2D, CONV3D, LINEAR, Names, Weight

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "peft"
PREFIX = "base_model.model."


@dataclasses.dataclass(frozen=True)
class Case:
    """One way to hold a fixture's weights in JAX.

    Attributes:
      fixture: The directory.
      weights: Rows of the name table.
      leaves: Paths and shapes.
      fn: `fn(base, *inputs)`; None where only tensors are compared.
      refused: Part of the error message, if the adapter is unsupported.
      dropped: Tensors of the adapter that are the base's own, and need not come back.
      merges: Whether the adapter can be merged.
    """

    fixture: str
    weights: tuple[Weight, ...]
    leaves: dict[str, tuple[int, ...]]
    fn: Callable | None = None
    refused: str = ""
    dropped: tuple[str, ...] = ()
    merges: bool = True

    @property
    def directory(self) -> pathlib.Path:
        return FIXTURES / self.fixture

    @property
    def adapter(self) -> pathlib.Path:
        return self.directory / "adapter"

    @property
    def names(self) -> Names:
        return Names(self.weights)

    @property
    def bindings(self):
        return {path: self.names.find(path, shape) for path, shape in self.leaves.items()}

    @functools.cached_property
    def io(self):
        stored = read(self.directory / "io.safetensors")
        return {k: jnp.asarray(v, jnp.int32 if v.dtype == np.int64 else v.dtype) for k, v in stored.items()}

    @property
    def inputs(self):
        return [self.io[f"x{i}"] for i in range(len(self.io)) if f"x{i}" in self.io]

    @property
    def base_tensors(self):
        return read(self.directory / "base.safetensors")

    @property
    def merged_tensors(self):
        """Those that merging changes; None where PEFT cannot merge."""
        if "merged" not in self.io:
            return None
        file = self.directory / "merged.safetensors"
        return read(file) if file.exists() else {}

    @property
    def base(self):
        """The leaves, from torch's tensors."""
        tensors = self.base_tensors
        (dtype,) = {array.dtype for array in tensors.values()}
        base = {
            path: jnp.asarray(binding.join(lambda name, part: tensors[name][part], dtype))
            for path, binding in self.bindings.items()
        }
        assert {name for binding in self.bindings.values() for name in binding.tensors} == tensors.keys()
        return base

    def torch(self, tree):
        """Torch's tensors, from leaves."""
        return {
            name: t
            for path, binding in self.bindings.items()
            for name, t in binding.split(np.asarray(tree[path])).items()
        }


def read(file):
    return load_file(file)


def read_config(directory):
    return json.loads((directory / "adapter_config.json").read_text())


def write_adapter(directory, tensors, config):
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    (directory / "adapter_config.json").write_text(json.dumps(config))


def affine(x, kernel, bias=None):
    y = x @ kernel
    return y if bias is None else y + spread(bias, y.ndim)


def spread(bias, ndim, axis=-1):
    """A vector along one axis, for strict promotion."""
    return jax.lax.broadcast_in_dim(bias, [bias.size if i == axis % ndim else 1 for i in range(ndim)], [axis % ndim])


def dense(name):
    return lambda base, x: affine(x, base[f"{name}/kernel"], base.get(f"{name}/bias"))


def chained(*layers):
    """Layers with tanh between them."""

    def fn(base, x):
        for index, layer in enumerate(layers):
            x = layer(base, jnp.tanh(x) if index else x)
        return x

    return fn


def linear_rows(*names, layout=LINEAR, **options):
    """Kernel and bias of modules, whose names are the same on both sides."""
    kernels = tuple(Weight(f"{name}/kernel", f"{name}.weight", layout, **options) for name in names)
    return kernels + tuple(Weight(f"{name}/bias", f"{name}.bias") for name in names)


def shapes(**sizes):
    """`fc=(8, 12)` is a kernel and a bias, `fc=(8, 12, None)` a kernel alone."""
    leaves = {}
    for name, (*kernel, last) in sizes.items():
        leaves[f"{name}/kernel"] = tuple(kernel) if last is None else (*kernel, last)
        if last is not None:
            leaves[f"{name}/bias"] = (last,)
    return leaves


# Linear layers.


def torch_dense(base, x):
    return affine(x, base["fc/weight"].T, base["fc/bias"])


def linear_model(fixture, name="fc", size=(8, 12), **options):
    return Case(fixture, linear_rows(name), shapes(**{name: size}), dense(name), **options)


def conv1d_hf(fixture):
    return Case(
        fixture,
        linear_rows("c_fc", "c_proj", layout="", module="conv1d"),
        shapes(c_fc=(8, 12), c_proj=(12, 12)),
        chained(dense("c_fc"), dense("c_proj")),
    )


MLP_LEAVES = shapes(fc1=(8, 12), fc2=(12, 10), classifier=(10, 3)) | {"norm/scale": (12,), "norm/bias": (12,)}
MLP_ROWS = (
    *linear_rows("fc1", "fc2", "classifier"),
    Weight("norm/scale", "norm.weight"),
    Weight("norm/bias", "norm.bias"),
)


def layer_norm(x, scale, bias):
    mean = x.mean(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(jnp.square(x - mean).mean(-1, keepdims=True) + 1e-5)
    return x * spread(scale, x.ndim) + spread(bias, x.ndim)


def mlp(base, x):
    h = layer_norm(jnp.tanh(dense("fc1")(base, x)), base["norm/scale"], base["norm/bias"])
    h = jnp.tanh(dense("fc2")(base, h))
    if "classifier/kernel" in base:
        return dense("classifier")(base, h)
    return chained(dense("classifier/first"), dense("classifier/second"))(base, h)


SAVED_ROWS = (
    *linear_rows("fc1", "fc2"),
    Weight("norm/scale", "norm.weight"),
    Weight("norm/bias", "norm.bias"),
    Weight("classifier/first/kernel", "classifier.0.weight", LINEAR),
    Weight("classifier/first/bias", "classifier.0.bias"),
    Weight("classifier/second/kernel", "classifier.2.weight", LINEAR),
    Weight("classifier/second/bias", "classifier.2.bias"),
)
SAVED_LEAVES = shapes(fc1=(8, 12), fc2=(12, 10)) | {
    "norm/scale": (12,),
    "norm/bias": (12,),
    "classifier/first/kernel": (10, 8),
    "classifier/first/bias": (8,),
    "classifier/second/kernel": (8, 3),
    "classifier/second/bias": (3,),
}


# Embeddings.


def lookup(base, x):
    return dense("head")(base, jnp.take(base["embed/embedding"], x, axis=0))


def lookup_case(fixture):
    return Case(
        fixture,
        (Weight("embed/embedding", "embed.weight", module="embedding"), *linear_rows("head")),
        {"embed/embedding": (14, 8), **shapes(head=(8, 10))},
        lookup,
    )


def tied(base, x):
    table = base["embed_tokens/embedding"]
    h = jnp.tanh(dense("mid")(base, jnp.take(table, x, axis=0)))
    head = base.get("lm_head/kernel")
    return h @ (table.T if head is None else head)


def tied_case(fixture, **options):
    return Case(
        fixture,
        (
            Weight("embed_tokens/embedding", "embed_tokens.weight", module="embedding", tied=("lm_head.weight",)),
            *linear_rows("mid"),
        ),
        {"embed_tokens/embedding": (14, 8), **shapes(mid=(8, 8))},
        tied,
        **options,
    )


def untied_case(fixture, **options):
    return Case(
        fixture,
        (
            Weight("embed_tokens/embedding", "embed_tokens.weight", module="embedding"),
            *linear_rows("mid"),
            Weight("lm_head/kernel", "lm_head.weight", LINEAR),
        ),
        {"embed_tokens/embedding": (14, 8), **shapes(mid=(8, 8)), "lm_head/kernel": (8, 14)},
        tied,
        **options,
    )


# Convolutions.


def convolution(name, stride, padding, groups=1, torch_layout=False):
    def fn(base, x):
        kernel, n = base[f"{name}/kernel"], x.ndim
        if torch_layout:
            spec = jax.lax.ConvDimensionNumbers(tuple(range(n)), tuple(range(n)), tuple(range(n)))
        else:
            last = (0, n - 1, *range(1, n - 1))
            spec = jax.lax.ConvDimensionNumbers(last, (n - 1, n - 2, *range(n - 2)), last)
            x = jnp.moveaxis(x, 1, -1)
        y = jax.lax.conv_general_dilated(
            x, kernel, stride, [(p, p) for p in padding], dimension_numbers=spec, feature_group_count=groups
        )
        y = y if torch_layout else jnp.moveaxis(y, -1, 1)
        return y + spread(base[f"{name}/bias"], y.ndim, 1) if f"{name}/bias" in base else y

    return fn


def conv_case(fixture, layout, kernel, stride, padding, groups=1, **options):
    return Case(
        fixture,
        linear_rows("conv", layout=layout),
        shapes(conv=kernel),
        convolution("conv", stride, padding, groups),
        **options,
    )


CONV2D_FN = chained(convolution("conv", (2, 1), (1, 2)), convolution("square", (1, 1), (1, 1)))
CONV2D_TORCH_FN = chained(
    convolution("conv", (2, 1), (1, 2), torch_layout=True), convolution("square", (1, 1), (1, 1), torch_layout=True)
)


def lora_bias(base, x):
    h = jnp.tanh(dense("fc")(base, x))[:, None]
    return convolution("conv", (1, 1), (0, 0))(base, h).mean((2, 3))


def lora_bias_convs(base, x):
    h = chained(convolution("conv", (1, 1), (0, 0)), convolution("grouped", (1, 1), (1, 1), 2))(base, x)
    return convolution("line", (2,), (1,))(base, jnp.tanh(h.reshape(*h.shape[:2], -1)))


# Attention.


def attend(q, k, v):
    q, k, v = (t.reshape(*t.shape[:2], 2, 4) if t.ndim == 3 else t for t in (q, k, v))
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2.0, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


def flat(x):
    return x.reshape(*x.shape[:-2], -1)


def attend_fused(base, x):
    qkv = affine(x, base["attn/qkv/kernel"], base.get("attn/qkv/bias"))
    return dense("attn/out")(base, flat(attend(*jnp.split(qkv, 3, axis=-1))))


FUSED_LEAVES = {
    "attn/qkv/kernel": (8, 24),
    "attn/qkv/bias": (24,),
    "attn/out/kernel": (8, 8),
    "attn/out/bias": (8,),
}


def fused_case(fixture):
    rows = (
        Weight("attn/qkv/kernel", "qkv.weight", LINEAR),
        Weight("attn/qkv/bias", "qkv.bias"),
        Weight("attn/out/kernel", "out.weight", LINEAR),
        Weight("attn/out/bias", "out.bias"),
    )
    return Case(fixture, rows, FUSED_LEAVES, attend_fused)


def multihead_case(fixture):
    rows = (
        Weight("attn/qkv/kernel", "attn.in_proj_weight", LINEAR),
        Weight("attn/qkv/bias", "attn.in_proj_bias"),
        Weight("attn/out/kernel", "attn.out_proj.weight", LINEAR),
        Weight("attn/out/bias", "attn.out_proj.bias"),
    )
    return Case(fixture, rows, FUSED_LEAVES, attend_fused)


def parts_case(fixture):
    """Three modules of torch in one kernel."""
    rows = (
        Weight("attn/qkv/kernel", "{part=q|k|v}_proj.weight", "in (part n) -> n in"),
        Weight("attn/qkv/bias", "{part=q|k|v}_proj.bias", "(part n) -> n"),
        Weight("attn/out/kernel", "o_proj.weight", LINEAR),
        Weight("attn/out/bias", "o_proj.bias"),
    )
    return Case(fixture, rows, FUSED_LEAVES, attend_fused)


def parts_axis_case(fixture):
    """Three modules of torch in one kernel, with an axis for the parts and one for the heads."""
    rows = (
        Weight("attn/qkv/kernel", "{part=q|k|v}_proj.weight", "in part heads width -> (heads width) in"),
        Weight("attn/qkv/bias", "{part=q|k|v}_proj.bias", "part heads width -> (heads width)"),
        Weight("attn/out/kernel", "o_proj.weight", LINEAR),
        Weight("attn/out/bias", "o_proj.bias"),
    )
    leaves = FUSED_LEAVES | {"attn/qkv/kernel": (8, 3, 2, 4), "attn/qkv/bias": (3, 2, 4)}

    def fn(base, x):
        qkv = jnp.einsum("bti,iphd->pbthd", x, base["attn/qkv/kernel"])
        if "attn/qkv/bias" in base:
            qkv += base["attn/qkv/bias"][:, None, None]
        return dense("attn/out")(base, flat(attend(*qkv)))

    return Case(fixture, rows, leaves, fn)


def without(case, *paths):
    """The same leaves without some biases, and an adapter with biases on B, which cannot be merged."""
    rows = tuple(row for row in case.weights if row.path not in paths)
    leaves = {path: size for path, size in case.leaves.items() if path not in paths}
    return dataclasses.replace(case, weights=rows, leaves=leaves, merges=False)


def heads_case(fixture):
    rows = (
        Weight("attn/{part=q|k|v}/kernel", "{part}_proj.weight", "in heads width -> (heads width) in"),
        Weight("attn/{part=q|k|v}/bias", "{part}_proj.bias", "heads width -> (heads width)"),
        Weight("attn/out/kernel", "o_proj.weight", "heads width out -> out (heads width)"),
        Weight("attn/out/bias", "o_proj.bias"),
    )
    leaves = {f"attn/{part}/kernel": (8, 2, 4) for part in "qkv"} | {f"attn/{part}/bias": (2, 4) for part in "qkv"}
    leaves |= {"attn/out/kernel": (2, 4, 8), "attn/out/bias": (8,)}

    def fn(base, x):
        parts = [
            jnp.einsum("bti,ihd->bthd", x, base[f"attn/{part}/kernel"]) + base[f"attn/{part}/bias"][None, None]
            for part in "qkv"
        ]
        y = jnp.einsum("bthd,hdo->bto", attend(*parts), base["attn/out/kernel"])
        return y + spread(base["attn/out/bias"], 3)

    return Case(fixture, rows, leaves, fn)


def interleaved_case(fixture):
    """Query and key whose heads keep the two halves of torch's rotary embedding interleaved."""
    rows = (
        Weight("attn/{part=q|k}/kernel", "{part}_proj.weight", "in heads pair half -> (heads half pair) in"),
        Weight("attn/{part=q|k}/bias", "{part}_proj.bias", "heads pair half -> (heads half pair)"),
        Weight("attn/v/kernel", "v_proj.weight", LINEAR),
        Weight("attn/v/bias", "v_proj.bias"),
        Weight("attn/out/kernel", "o_proj.weight", LINEAR),
        Weight("attn/out/bias", "o_proj.bias"),
    )
    leaves = {f"attn/{part}/kernel": (8, 2, 2, 2) for part in "qk"} | {f"attn/{part}/bias": (2, 2, 2) for part in "qk"}
    leaves |= {"attn/v/kernel": (8, 8), "attn/v/bias": (8,), "attn/out/kernel": (8, 8), "attn/out/bias": (8,)}

    def fn(base, x):
        q, k = (
            jnp.einsum("bti,ihpf->bthpf", x, base[f"attn/{part}/kernel"]) + base[f"attn/{part}/bias"][None, None]
            for part in "qk"
        )
        # Products of queries and keys do not depend on the order within a head.
        q, k = (flat(t) for t in (q, k))
        return dense("attn/out")(base, flat(attend(q, k, dense("attn/v")(base, x))))

    return Case(fixture, rows, leaves, fn)


# Experts.


def experts_case(fixture, transposed=False, inner=10, layout=""):
    """`layout` is that of torch ('') or in, out."""
    in_out = transposed or bool(layout)
    up, down = ((3, 8, inner), (3, inner, 8)) if in_out else ((3, inner, 8), (3, 8, inner))
    module = "transposed_experts" if transposed else "experts"
    rows = tuple(
        Weight(f"experts/{part}", f"mlp.experts.{part}_proj", layout, module=module) for part in ("gate_up", "down")
    )

    def fn(base, x, gates):
        eq = ("ti,eij->etj", "etj,ejo->eto") if in_out else ("ti,eji->etj", "etj,eoj->eto")
        hidden = jnp.tanh(jnp.einsum(eq[0], x, base["experts/gate_up"]))
        return jnp.einsum("eto,te->to", jnp.einsum(eq[1], hidden, base["experts/down"]), gates)

    return Case(fixture, rows, {"experts/gate_up": up, "experts/down": down}, fn)


# Layers.

LAYER_ROWS = (
    Weight("layers/{layer}/up/kernel", "layers.{layer}.up.weight", LINEAR),
    Weight("layers/{layer}/up/bias", "layers.{layer}.up.bias"),
    Weight("layers/{layer}/down/kernel", "layers.{layer}.down.weight", LINEAR),
)


def block(x, up, bias, down):
    return x + jnp.tanh(affine(x, up, bias)) @ down


def layers_case(fixture):
    def fn(base, x):
        for i in range(3):
            x = block(x, *(base[f"layers/{i}/{name}"] for name in ("up/kernel", "up/bias", "down/kernel")))
        return x

    leaves = {}
    for i in range(3):
        leaves |= {
            f"layers/{i}/up/kernel": (8, 12),
            f"layers/{i}/up/bias": (12,),
            f"layers/{i}/down/kernel": (12, 8),
        }
    return Case(fixture, LAYER_ROWS, leaves, fn)


def stacked_case(fixture):
    """The same layers, scanned."""

    def fn(base, x):
        layers = tuple(base[f"layers/{name}"] for name in ("up/kernel", "up/bias", "down/kernel"))
        return jax.lax.scan(lambda x, layer: (block(x, *layer), None), x, layers)[0]

    leaves = {"layers/up/kernel": (3, 8, 12), "layers/up/bias": (3, 12), "layers/down/kernel": (3, 12, 8)}
    return Case(fixture, LAYER_ROWS, leaves, fn)


# Models of transformers: tensors only.


def llama_case(stacked, fixture="llama", **options):
    sizes = {
        "attn/q": ("self_attn.q_proj", (8, 8)),
        "attn/k": ("self_attn.k_proj", (8, 4)),
        "attn/v": ("self_attn.v_proj", (8, 4)),
        "attn/o": ("self_attn.o_proj", (8, 8)),
        "mlp/gate": ("mlp.gate_proj", (8, 12)),
        "mlp/up": ("mlp.up_proj", (8, 12)),
        "mlp/down": ("mlp.down_proj", (12, 8)),
    }
    rows = [
        Weight("embed/embedding", "model.embed_tokens.weight", module="embedding"),
        Weight("norm/scale", "model.norm.weight"),
        Weight("head/kernel", "lm_head.weight", LINEAR),
    ]
    leaves = {"embed/embedding": (16, 8), "norm/scale": (8,), "head/kernel": (8, 16)}
    at = "model.layers.{layer}"
    for path, (name, size) in sizes.items():
        rows.append(Weight(f"layers/{{layer}}/{path}/kernel", f"{at}.{name}.weight", LINEAR))
        leaves |= _layered(f"{path}/kernel", size, stacked)
    for name in ("input_layernorm", "post_attention_layernorm"):
        rows.append(Weight(f"layers/{{layer}}/{name}/scale", f"{at}.{name}.weight"))
        leaves |= _layered(f"{name}/scale", (8,), stacked)
    return Case(fixture, tuple(rows), leaves, **options)


def bert_case(stacked):
    sizes = {
        "attention.self.query": (8, 8),
        "attention.self.key": (8, 8),
        "attention.self.value": (8, 8),
        "attention.output.dense": (8, 8),
        "intermediate.dense": (8, 12),
        "output.dense": (12, 8),
    }
    rows, leaves = [], {}
    for name, size in (("word", (16, 8)), ("position", (8, 8)), ("token_type", (2, 8))):
        rows.append(Weight(f"embed/{name}", f"bert.embeddings.{name}_embeddings.weight", module="embedding"))
        leaves[f"embed/{name}"] = size
    for path, name in (("embed/norm", "bert.embeddings.LayerNorm"),):
        rows += [Weight(f"{path}/scale", f"{name}.weight"), Weight(f"{path}/bias", f"{name}.bias")]
        leaves |= {f"{path}/scale": (8,), f"{path}/bias": (8,)}
    at = "bert.encoder.layer.{layer}"
    for name, (width, out) in sizes.items():
        path = name.replace(".", "/")
        rows.append(Weight(f"layers/{{layer}}/{path}/kernel", f"{at}.{name}.weight", LINEAR))
        rows.append(Weight(f"layers/{{layer}}/{path}/bias", f"{at}.{name}.bias"))
        leaves |= _layered(f"{path}/kernel", (width, out), stacked) | _layered(f"{path}/bias", (out,), stacked)
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        path = name.replace(".", "/")
        rows.append(Weight(f"layers/{{layer}}/{path}/scale", f"{at}.{name}.weight"))
        rows.append(Weight(f"layers/{{layer}}/{path}/bias", f"{at}.{name}.bias"))
        leaves |= _layered(f"{path}/scale", (8,), stacked) | _layered(f"{path}/bias", (8,), stacked)
    for path, name, size in (("pooler", "bert.pooler.dense", (8, 8)), ("classifier", "classifier", (8, 3))):
        rows += [Weight(f"{path}/kernel", f"{name}.weight", LINEAR), Weight(f"{path}/bias", f"{name}.bias")]
        leaves |= shapes(**{path: size})
    return Case("bert", tuple(rows), leaves)


def _layered(path, size, stacked):
    if stacked:
        return {f"layers/{path}": (2, *size)}
    return {f"layers/{i}/{path}": size for i in range(2)}


# Training.


def train_model(fixture):
    return Case(
        fixture,
        linear_rows("fc1", "fc2"),
        shapes(fc1=(8, 16), fc2=(16, 3)),
        chained(dense("fc1"), dense("fc2")),
    )


def bag(base, x):
    return dense("head")(base, jnp.take(base["embed/embedding"], x, axis=0).mean(1))


TRAINING = {
    "train_linear": train_model("train_linear"),
    "train_dora": train_model("train_dora"),
    "train_embedding": Case(
        "train_embedding",
        (Weight("embed/embedding", "embed.weight", module="embedding"), *linear_rows("head")),
        {"embed/embedding": (14, 8), **shapes(head=(8, 3))},
        bag,
    ),
}

CASES = TRAINING | {
    "linear": linear_model("linear"),
    "linear, torch's layout": Case(
        "linear",
        (Weight("fc/weight", "fc.weight"), Weight("fc/bias", "fc.bias")),
        {"fc/weight": (12, 8), "fc/bias": (12,)},
        torch_dense,
    ),
    "linear_no_bias": linear_model("linear_no_bias", size=(12, 12, None)),
    "bf16_base": linear_model("bf16_base"),
    "parameter_of_a_linear": linear_model("parameter_of_a_linear"),
    "conv1d_hf": conv1d_hf("conv1d_hf"),
    "conv1d_hf_beside_linear": Case(
        "conv1d_hf_beside_linear",
        (*linear_rows("fc"), *linear_rows("c_proj", layout="", module="conv1d")),
        shapes(fc=(12, 12), c_proj=(12, 12)),
        chained(dense("fc"), dense("c_proj")),
    ),
    "lora_bias": Case(
        "lora_bias",
        (*linear_rows("fc"), *linear_rows("conv", layout=CONV2D)),
        shapes(fc=(8, 12), conv=(2, 3, 1, 10)),
        lora_bias,
    ),
    "lora_bias_layers": dataclasses.replace(layers_case("lora_bias_layers"), merges=False),
    "lora_bias_layers, stacked": dataclasses.replace(stacked_case("lora_bias_layers"), merges=False),
    "lora_bias_parts": without(parts_case("lora_bias_parts"), "attn/qkv/bias"),
    "lora_bias_parts, an axis for parts": without(parts_axis_case("lora_bias_parts"), "attn/qkv/bias"),
    "lora_bias_convs": Case(
        "lora_bias_convs",
        (*linear_rows("conv", "grouped", layout=CONV2D), *linear_rows("line", layout=CONV1D)),
        shapes(conv=(2, 3, 3, 8, None), grouped=(3, 3, 4, 12, None), line=(3, 12, 5, None)),
        lora_bias_convs,
        merges=False,
    ),
    "lora_bias_llama": llama_case(stacked=False, fixture="lora_bias_llama", merges=False),
    "lora_bias_llama, stacked": llama_case(stacked=True, fixture="lora_bias_llama", merges=False),
    "bias_all": Case("bias_all", MLP_ROWS, MLP_LEAVES, mlp),
    "bias_lora_only": Case("bias_lora_only", MLP_ROWS, MLP_LEAVES, mlp),
    "modules_to_save": Case("modules_to_save", SAVED_ROWS, SAVED_LEAVES, mlp),
    "embedding": lookup_case("embedding"),
    "embedding_tied": tied_case("embedding_tied"),
    "embedding_saved": untied_case("embedding_saved", dropped=(f"{PREFIX}embed_tokens.base_layer.weight",)),
    "embedding_saved_untargeted": untied_case(
        "embedding_saved_untargeted", dropped=(f"{PREFIX}embed_tokens.weight", f"{PREFIX}lm_head.weight")
    ),
    "trainable_tokens": lookup_case("trainable_tokens"),
    "trainable_tokens_tied": tied_case("trainable_tokens_tied"),
    "conv1d": conv_case("conv1d", CONV1D, (3, 6, 10), (2,), (1,)),
    "conv2d": Case(
        "conv2d",
        linear_rows("conv", "square", layout=CONV2D),
        shapes(conv=(3, 2, 3, 8), square=(3, 3, 8, 8, None)),
        CONV2D_FN,
    ),
    "conv2d, torch's layout": Case(
        "conv2d",
        linear_rows("conv", "square", layout=""),
        {"conv/kernel": (8, 3, 3, 2), "conv/bias": (8,), "square/kernel": (8, 8, 3, 3)},
        CONV2D_TORCH_FN,
    ),
    "conv3d": conv_case("conv3d", CONV3D, (2, 3, 2, 3, 8), (1, 2, 1), (1, 0, 1)),
    "conv2d_grouped": conv_case("conv2d_grouped", CONV2D, (3, 3, 4, 12), (1, 1), (1, 1), 2, refused=r"conv.*group"),
    "conv2d_grouped_diagonal": conv_case("conv2d_grouped_diagonal", CONV2D, (3, 3, 4, 12), (1, 1), (1, 1), 2),
    "dora_linear": Case(
        "dora_linear",
        linear_rows("fc", "square"),
        shapes(fc=(8, 12), square=(12, 12, None)),
        chained(dense("fc"), dense("square")),
    ),
    "dora_conv1d_hf": conv1d_hf("dora_conv1d_hf"),
    "dora_embedding": lookup_case("dora_embedding"),
    "dora_conv1d": conv_case("dora_conv1d", CONV1D, (3, 6, 10), (1,), (1,)),
    "dora_conv2d": conv_case("dora_conv2d", CONV2D, (3, 2, 3, 8), (2, 1), (1, 2)),
    "dora_conv3d": conv_case("dora_conv3d", CONV3D, (2, 3, 2, 3, 8), (1, 1, 1), (1, 0, 1)),
    "multihead_attention": multihead_case("multihead_attention"),
    "multihead_attention_out_proj": multihead_case("multihead_attention_out_proj"),
    "fused_qkv": fused_case("fused_qkv"),
    "parts_qkv": parts_case("parts_qkv"),
    "parts_qv": parts_case("parts_qv"),
    "parts_uneven": parts_case("parts_uneven"),
    "parts_qkv, an axis for parts": parts_axis_case("parts_qkv"),
    "parts_qv, an axis for parts": parts_axis_case("parts_qv"),
    "parts_qkv, apart": heads_case("parts_qkv"),
    "parts_qkv, interleaved heads": interleaved_case("parts_qkv"),
    "heads": heads_case("heads"),
    "experts_one": experts_case("experts_one"),
    "experts_one, in before out": experts_case("experts_one", layout="batch in out -> batch out in"),
    "experts_two": experts_case("experts_two"),
    "experts_two, in before out": experts_case("experts_two", layout="batch in out -> batch out in"),
    "experts_two_named_the_other_way_round": experts_case("experts_two_named_the_other_way_round", inner=8),
    "experts_patterns": experts_case("experts_patterns"),
    "experts_transposed_one": experts_case("experts_transposed_one", transposed=True, inner=8),
    "experts_transposed_two": experts_case("experts_transposed_two", transposed=True),
    "patterns": layers_case("patterns"),
    "rslora": layers_case("rslora"),
    "rslora_patterns": layers_case("rslora_patterns"),
    "rslora_patterns, stacked": stacked_case("rslora_patterns"),
    "stacked": stacked_case("stacked"),
    "stacked, unrolled": layers_case("stacked"),
    "stacked_initial": stacked_case("stacked_initial"),
    "stacked_uneven": stacked_case("stacked_uneven"),
    "stacked_some": stacked_case("stacked_some"),
    "stacked_some, unrolled": layers_case("stacked_some"),
    "stacked_dora": stacked_case("stacked_dora"),
    "llama": llama_case(stacked=False),
    "llama, stacked": llama_case(stacked=True),
    "bert": bert_case(stacked=False),
    "bert, stacked": bert_case(stacked=True),
}
