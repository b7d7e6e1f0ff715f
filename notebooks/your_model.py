# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own model: one spec on plain JAX, Flax NNX, Flax Linen and Equinox
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/your_model.ipynb)
#
# lora_jax adapts functions of parameters, so a model of any framework needs two things: a function `fn(base, x)` and
# its tree of parameters. You write one small transformer four times, adapt all four with one spec, and see equal
# outputs and training runs. Then you scan over the layers, as large models do, and see the same outputs again.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 2 | 3 | 1 | 1 |
# | memory | 1.3 GB | 1.3 GB | 0.2 GB | 0.2 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. Almost all of the time is
# compilation, which takes as long as here on a GPU or TPU; the arithmetic, 1 TFLOP, takes seconds on each. *Memory:* on
# Colab's CPU as here; on an accelerator, arrays take at most 0.1 GB (the digits and small networks), and the
# temporaries of the largest step 0.1 GB, by XLA's memory analysis on a CPU.

# %% tags=["hide-input"]
import importlib.util
import sys
from pathlib import Path

SOURCE = Path("lora_jax_source")  # a clone, which is reused after a restart of the kernel
if SOURCE.exists():
    sys.path.insert(0, str(SOURCE))
try:
    import experiments  # noqa: F401
    import lora_jax  # noqa: F401
except ImportError:
    import subprocess

    def sh(command):
        subprocess.run(command, shell=True, check=True)

    if not SOURCE.exists():
        sh(f"git clone --depth 1 https://github.com/lora-jax/lora_jax {SOURCE}")
    # A GPU or TPU needs JAX's plugin in the version of JAX, so that both are installed together.
    plugins = {"libtpu": "tpu", "jax_cuda12_plugin": "cuda12", "jax_cuda13_plugin": "cuda13"}
    extras = ",".join(extra for module, extra in plugins.items() if importlib.util.find_spec(module))
    sh(f"{sys.executable} -m pip install -q ./{SOURCE} 'jax[{extras}]' equinox matplotlib scikit-learn")
    sys.path.insert(0, str(SOURCE))

# %%
import dataclasses
import os
import resource
import time

import equinox as eqx
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen, nnx
from sklearn.datasets import load_digits

import lora_jax as lora

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # smaller sizes, to test this notebook
STEPS = 20 if FAST else 200
WIDTH, DEPTH = 32, 2 if FAST else 4
jax.config.update("jax_default_matmul_precision", "highest")  # equal numbers are equal on GPUs and TPUs too
GRAY = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#7f7f7f")
plt.rcParams.update({**GRAY, "figure.facecolor": "none", "axes.facecolor": "none", "legend.framealpha": 0})

# %% [markdown]
# ## Plain functions
#
# The model reads a picture of a digit as a sequence of 8 rows of pixels. Its parameters are a nested dict. Train it on
# upright digits, so that there is something to adapt: the new task is the same digits in a mirror.

# %%
SIZES = dict.fromkeys(("query", "key", "value", "output"), (WIDTH, WIDTH))
SIZES |= {"up": (WIDTH, 2 * WIDTH), "down": (2 * WIDTH, WIDTH)}


def attend(query, key, value):  # it has no parameters: all four frameworks use it
    return jax.nn.softmax(query @ key.mT / np.sqrt(WIDTH)) @ value


def plain_block(block, x):
    query, key, value = (x @ block[name]["kernel"] for name in ("query", "key", "value"))
    x = x + attend(query, key, value) @ block["output"]["kernel"]
    return x + jax.nn.gelu(x @ block["up"]["kernel"]) @ block["down"]["kernel"]


def plain(base, x):
    x = x @ base["embed"]["kernel"] + base["position"]
    for block in base["blocks"]:
        x = plain_block(block, x)
    return x.mean(axis=-2) @ base["head"]["kernel"]


def plain_init(key, depth):
    def linear(size):
        return {"kernel": jax.random.normal(next(keys), size) / np.sqrt(size[0])}

    keys = iter(jax.random.split(key, 6 * depth + 3))
    blocks = [{name: linear(size) for name, size in SIZES.items()} for _ in range(depth)]
    position = 0.1 * jax.random.normal(next(keys), (8, WIDTH))
    return {"embed": linear((8, WIDTH)), "position": position, "blocks": blocks, "head": linear((WIDTH, 10))}


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


digits = load_digits()
images, labels = (digits.images / 16).astype(np.float32), digits.target
x, y = images[:500, :, ::-1], labels[:500]  # the training examples of the new task
base, tx = plain_init(jax.random.key(0), DEPTH), optax.adam(3e-3)
opt_state = tx.init(base)
gradient = jax.jit(jax.grad(lambda base: cross_entropy(plain(base, images[:1000]), labels[:1000])))
for _ in range(STEPS):
    updates, opt_state = tx.update(gradient(base), opt_state)
    base = optax.apply_updates(base, updates)
for name, pixels in {"upright": images, "mirrored": images[:, :, ::-1]}.items():
    print(f"{name}: {np.mean(plain(base, pixels[1000:]).argmax(-1) == labels[1000:]):.1%} of the test examples")

# %% [markdown]
# ## The spec
#
# Patterns of paths to recipes: this is all that the library needs to know. It finds by tracing which axis of each
# weight is contracted. Note the `(kernel|weight)` at the end of the pattern, which is all that the frameworks need to
# agree on.

# %%
spec = {r"(query|value|up|down|head)/(kernel|weight)$": lora.LoRA(rank=4, alpha=8)}
models = {"plain": (plain, base)}
delta = lora.init(jax.random.key(1), base, spec, plain, x)
adapted = lora.adapt(plain)
print(adapted(base, delta, x).shape)
print(lora.summary(base, delta))

# %% [markdown]
# ## Flax NNX
#
# `lora.nnx.functional` splits a module into such a function and its parameters. The module itself is not changed.
# Look at the paths: they are those of the plain dict.


# %%
class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        for name, size in SIZES.items():
            setattr(self, name, nnx.Linear(*size, use_bias=False, rngs=rngs))

    def __call__(self, x):
        x = x + self.output(attend(self.query(x), self.key(x), self.value(x)))
        return x + self.down(jax.nn.gelu(self.up(x)))


class NNXNet(nnx.Module):
    def __init__(self, rngs, scan=False):
        self.embed = nnx.Linear(8, WIDTH, use_bias=False, rngs=rngs)
        self.position = nnx.Param(jnp.zeros((8, WIDTH)))
        self.scan = scan
        if scan:
            self.blocks = nnx.vmap(NNXBlock)(rngs.split(DEPTH))
        else:
            self.blocks = nnx.List(NNXBlock(rngs) for _ in range(DEPTH))
        self.head = nnx.Linear(WIDTH, 10, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x) + self.position
        if self.scan:
            call = nnx.scan(lambda block, x: block(x), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
            x = call(self.blocks, x)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(x.mean(axis=-2))


models["NNX"] = lora.nnx.functional(NNXNet(nnx.Rngs(0)))
print(*lora.paths.flatten(models["NNX"][1]).paths[:4], sep="\n")

# %% [markdown]
# ## Flax Linen
#
# `Module.apply` is the function already, and `params` the tree. Linen numbers its modules as `blocks_0`.


# %%
class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x):
        def dense(name):
            return linen.Dense(SIZES[name][1], use_bias=False, name=name)

        x = x + dense("output")(attend(dense("query")(x), dense("key")(x), dense("value")(x)))
        return x + dense("down")(jax.nn.gelu(dense("up")(x)))


class LinenNet(linen.Module):
    scan: bool = False

    @linen.compact
    def __call__(self, x):
        x = linen.Dense(WIDTH, use_bias=False, name="embed")(x)
        x = x + self.param("position", linen.initializers.zeros, (8, WIDTH))
        if self.scan:
            options = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}, "length": DEPTH}
            scan = linen.scan(lambda block, x, _: (block(x), None), **options)
            x, _ = scan(LinenBlock(name="blocks"), x, None)
        else:
            for i in range(DEPTH):
                x = LinenBlock(name=f"blocks_{i}")(x)
        return linen.Dense(10, use_bias=False, name="head")(x.mean(axis=-2))


def linen_model(net):
    return lambda params, x: net.apply({"params": params}, x), net.init(jax.random.key(0), x)["params"]


models["Linen"] = linen_model(LinenNet())
print(*lora.paths.flatten(models["Linen"][1]).paths[:4], sep="\n")

# %% [markdown]
# ## Equinox
#
# The module is the tree of its parameters, and calling it is the function. Its linear layers act on one vector and
# store weights as `[out, in]`; the trace finds that too.


# %%
class EqxBlock(eqx.Module):
    query: eqx.nn.Linear
    key: eqx.nn.Linear
    value: eqx.nn.Linear
    output: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        for subkey, (name, size) in zip(jax.random.split(key, 6), SIZES.items()):
            setattr(self, name, eqx.nn.Linear(*size, use_bias=False, key=subkey))

    def __call__(self, x):
        query, key, value = (jax.vmap(layer)(x) for layer in (self.query, self.key, self.value))
        x = x + jax.vmap(self.output)(attend(query, key, value))
        return x + jax.vmap(lambda row: self.down(jax.nn.gelu(self.up(row))))(x)


class EqxNet(eqx.Module):
    embed: eqx.nn.Linear
    position: jax.Array
    blocks: list[EqxBlock] | EqxBlock
    head: eqx.nn.Linear

    def __init__(self, key, scan=False):
        one, two, three = jax.random.split(key, 3)
        self.embed = eqx.nn.Linear(8, WIDTH, use_bias=False, key=one)
        self.position = jnp.zeros((8, WIDTH))
        keys = jax.random.split(two, DEPTH)
        self.blocks = eqx.filter_vmap(EqxBlock)(keys) if scan else [EqxBlock(key) for key in keys]
        self.head = eqx.nn.Linear(WIDTH, 10, use_bias=False, key=three)

    def __call__(self, x):
        x = jax.vmap(self.embed)(x) + self.position
        if isinstance(self.blocks, EqxBlock):
            arrays, static = eqx.partition(self.blocks, eqx.is_array)
            x, _ = jax.lax.scan(lambda x, block: (eqx.combine(block, static)(x), None), x, arrays)
        else:
            for block in self.blocks:
                x = block(x)
        return self.head(x.mean(axis=-2))


def call_each(net, x):
    return jax.vmap(net)(x)


models["Equinox"] = call_each, EqxNet(jax.random.key(0))
node = lora.init(jax.random.key(1), models["Equinox"][1], spec, call_each, x)["blocks/0/up/weight"]
print("blocks/0/up/weight:", node.shape(), node.axes, "a", node.a.shape, "b", node.b.shape)

# %% [markdown]
# ## Equal outputs
#
# All four get the weights of the plain model, and one delta with random factors. Factors are `[rank, in]` and
# `[rank, out]` whatever the layout of the weight, so they move between frameworks as they are; only paths differ.


# %%
def plain_path(path):
    return path.replace("blocks_", "blocks/").replace("weight", "kernel")


def with_weights(tree, weights):
    """A tree of another framework with the weights of the plain model."""
    flat = lora.paths.flatten(tree)
    leaves = [weights[plain_path(path)].mT if "weight" in path else weights[plain_path(path)] for path in flat.paths]
    return flat.treedef.unflatten(leaves)


def with_factors(delta, factors):
    """A delta of another framework with the factors of the plain model's."""
    pairs = {path: factors[plain_path(path)] for path in delta}
    return {
        path: dataclasses.replace(node, a=jnp.array(pairs[path].a), b=jnp.array(pairs[path].b))
        for path, node in delta.items()
    }


def adapt_all(models, weights, factors):
    """(adapted, base, delta) for each framework, with the same weights and factors."""
    for name, (fn, tree) in models.items():
        tree = with_weights(tree, weights)
        yield name, lora.adapt(fn), tree, with_factors(lora.init(jax.random.key(1), tree, spec, fn, x), factors)


weights = lora.paths.flatten(base).as_dict()
random = {
    path: dataclasses.replace(node, b=0.01 * jax.random.normal(jax.random.key(i), node.b.shape))
    for i, (path, node) in enumerate(delta.items())
}
outputs = {name: adapted(tree, delta, x) for name, adapted, tree, delta in adapt_all(models, weights, random)}
for name, output in outputs.items():
    print(f"{name:8}", np.asarray(output[0, :6]).round(4))
    np.testing.assert_allclose(output, outputs["plain"], rtol=1e-4, atol=1e-3)
assert jnp.abs(outputs["plain"] - plain(base, x)).max() > 0.1, "the delta changes the outputs"

# %% [markdown]
# ## Equal training runs
#
# The training step is the same code for all four. Their curves lie on each other; the printed distances are what
# rounding leaves between them.


# %%
def train(adapted, tree, delta):
    def loss(base, delta, batch, key):
        return cross_entropy(adapted(base, delta, batch[0]), batch[1])

    state, step, losses = lora.TrainState.create(tree, delta, tx, jax.random.key(0)), lora.train_step(loss, tx), []
    for _ in range(STEPS):
        state, metrics = step(state, (x, y))
        losses.append(float(metrics["loss"]))
    return losses, state.delta


runs = {name: train(*arguments) for name, *arguments in adapt_all(models, weights, delta)}
reference = np.array(runs["plain"][0])
colors = ("#bab0ac", "#4c78a8", "#f58518", "#54a24b")
figure, axes = plt.subplots(figsize=(6, 3))
for (name, (losses, _)), width, color in zip(runs.items(), (10, 7, 4, 1.5), colors):
    axes.plot(losses, linewidth=width, color=color, label=name)
    print(f"{name:8} relative distance from plain at most {np.max(np.abs(losses - reference) / reference):.0e}")
    np.testing.assert_allclose(losses, reference, rtol=1e-2)
axes.set(xlabel="step", ylabel="training loss", yscale="log")
axes.legend()
plt.show()

# %% [markdown]
# ## Back into the framework
#
# `merge` returns what it got: a dict, or an `EqxNet`. `nnx.update` puts merged weights into an NNX module. All four
# classify the mirrored digits now.

# %%
merged = {name: lora.merge(with_weights(models[name][1], weights), trained) for name, (_, trained) in runs.items()}
module = NNXNet(nnx.Rngs(0))
nnx.update(module, merged["NNX"])
calls = {"plain": lambda x: plain(merged["plain"], x), "NNX": module, "Equinox": jax.vmap(merged["Equinox"])}
calls["Linen"] = lambda x: LinenNet().apply({"params": merged["Linen"]}, x)
for name, call in calls.items():
    correct = np.mean(call(images[1000:, :, ::-1]).argmax(-1) == labels[1000:])
    print(f"{name:8} {type(merged[name]).__name__:7} {correct:.1%} of the mirrored test examples")

# %% [markdown]
# ## Scanned layers
#
# Large models stack the weights of equal layers and scan over them. The scanned axis traces as `batch`, so each layer
# has its own factors, `[layers, rank, in]`, and the spec does not change. Stacked, the factors of the unrolled model
# give the unrolled model's outputs.


# %%
def plain_scanned(base, x):
    x = x @ base["embed"]["kernel"] + base["position"]
    x, _ = jax.lax.scan(lambda x, block: (plain_block(block, x), None), x, base["blocks"])
    return x.mean(axis=-2) @ base["head"]["kernel"]


def stack_blocks(base):
    return {**base, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *base["blocks"])}


def stack_factors(delta):
    """Puts the adapters of all layers into one, as `stack_blocks` does with weights."""
    stacked = {path: node for path, node in delta.items() if "blocks" not in path}
    for path in delta:
        if path.startswith("blocks/0/"):
            nodes = [delta[path.replace("/0/", f"/{i}/")] for i in range(DEPTH)]
            a, b = (jnp.stack([getattr(node, name) for node in nodes]) for name in "ab")
            stacked[path.replace("/0/", "/")] = dataclasses.replace(nodes[0], a=a, b=b)
    return stacked


scanned = {
    "plain": (plain_scanned, stack_blocks(base)),
    "NNX": lora.nnx.functional(NNXNet(nnx.Rngs(0), scan=True)),
    "Linen": linen_model(LinenNet(scan=True)),
    "Equinox": (call_each, EqxNet(jax.random.key(0), scan=True)),
}
stacked_weights = lora.paths.flatten(stack_blocks(base)).as_dict()
for name, adapted, tree, delta_scanned in adapt_all(scanned, stacked_weights, stack_factors(random)):
    output, (path, node) = adapted(tree, delta_scanned, x), next(iter(delta_scanned.items()))
    print(f"{name:8} {path:20} {node.axes!s:24} a {node.a.shape!s:12}", np.asarray(output[0, :3]).round(4))
    np.testing.assert_allclose(output, outputs["plain"], rtol=1e-4, atol=1e-3)

# %% [markdown]
# ## Why scan
#
# A scanned model is one layer to the compiler. The figure shows the size of the program for the gradient of the adapted
# function, by depth: it grows with the layers of the unrolled model, and stays the same for the scanned one. So does,
# for large models, the time to compile it.


# %%
def program_lines(fn, base):
    delta, adapted = lora.init(jax.random.key(1), base, spec, fn, x), lora.adapt(fn)
    gradient = jax.jit(jax.grad(lambda delta, base: cross_entropy(adapted(base, delta, x), y)))
    return gradient.lower(delta, base).as_text().count("\n")


depths = (1, 2) if FAST else (1, 2, 4, 8, 16)
bases = [plain_init(jax.random.key(0), depth) for depth in depths]
figure, axes = plt.subplots(figsize=(6, 3))
axes.plot(depths, [program_lines(plain, base) for base in bases], marker="o", label="unrolled")
axes.plot(depths, [program_lines(plain_scanned, stack_blocks(base)) for base in bases], marker="s", label="scanned")
axes.set(xlabel="layers", ylabel="lines of the program", xscale="log", ylim=(0, None))
axes.set_xticks(depths, map(str, depths))
axes.minorticks_off()
axes.legend()
plt.show()

# %%
minutes, memory = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {memory:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - [Your own model](https://lora-jax.github.io/lora_jax/guides/your_model.html): dropout and batch statistics of NNX,
#   Haiku, experts, fused kernels, more specs
# - [How it works](https://lora-jax.github.io/lora_jax/how_it_works.html): how the trace finds the roles of axes
# - [Debugging with `explain`](https://lora-jax.github.io/lora_jax/guides/debugging.html): which weights are factored
# - [`many_runs.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/many_runs.ipynb): a grid of ranks and
#   learning rates in one compiled step
