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
# # LoRA and DoRA from scratch, then with the library
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/lora_from_scratch.ipynb)
#
# You write LoRA and DoRA by hand in 40 lines, with the conventions that teaching code usually has. Then you write a
# spec that gives the same outputs, gradients and training runs with lora_jax, and see which option each convention
# corresponds to. At the end you see what the conventions do to the size of an update, and what the library saves.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 1 | 2 | 1 | 1 |
# | memory | 1.5 GB | 1.5 GB | 0.2 GB | 0.2 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. Almost all of the time is
# compilation, which takes as long as here on a GPU or TPU; the arithmetic, 0.5 TFLOP, takes seconds on each. *Memory:*
# on Colab's CPU as here; on an accelerator, arrays take at most 0.1 GB (the digits and small networks), and the
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
    sh(f"{sys.executable} -m pip install -q ./{SOURCE} 'jax[{extras}]' matplotlib scikit-learn")
    sys.path.insert(0, str(SOURCE))

# %%
import dataclasses
import os
import resource
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.datasets import load_digits

import lora_jax as lora

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # smaller sizes, to test this notebook
STEPS = 40 if FAST else 300
RANK, ALPHA = 4, 2.0
jax.config.update("jax_default_matmul_precision", "highest")  # equal numbers are equal on GPUs and TPUs too
GRAY = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#7f7f7f")
plt.rcParams.update({**GRAY, "figure.facecolor": "none", "axes.facecolor": "none", "legend.framealpha": 0})

# %% [markdown]
# ## A base and a new task
#
# The base is a network of three layers that reads handwritten digits of 8 × 8 pixels. The new task is the same digits
# in a mirror. Look at the two accuracies: the base does not read the mirrored ones.


# %%
def model(base, x):
    for name in ("first", "second"):
        x = jax.nn.gelu(x @ base[name]["kernel"] + base[name]["bias"])
    return x @ base["third"]["kernel"] + base["third"]["bias"]


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def accuracy(base, pixels):
    return float(jnp.mean(model(base, pixels[1300:]).argmax(-1) == labels[1300:]))


digits = load_digits()
images, labels = (digits.images / 16).astype(np.float32), digits.target
upright, mirrored = images.reshape(-1, 64), images[:, :, ::-1].reshape(-1, 64)
x, y = mirrored[:1300], labels[:1300]  # the training examples of the new task

base, sizes = {}, {"first": (64, 128), "second": (128, 128), "third": (128, 10)}
for key, (name, size) in zip(jax.random.split(jax.random.key(0), 3), sizes.items()):
    kernel = jax.random.normal(key, size) * np.sqrt(2 / size[0])
    base[name] = {"kernel": kernel, "bias": jnp.zeros(size[1])}

tx = optax.adam(3e-3)
slope = jax.jit(jax.grad(lambda base: cross_entropy(model(base, upright[:1300]), labels[:1300])))
opt_state = tx.init(base)
for _ in range(100):
    updates, opt_state = tx.update(slope(base), opt_state)
    base = optax.apply_updates(base, updates)
print(f"test accuracy of the base: upright {accuracy(base, upright):.1%}, mirrored {accuracy(base, mirrored):.1%}")

# %% [markdown]
# ## From scratch, in 40 lines
#
# LoRA adds `alpha · x·a·b` to the output of a frozen layer. DoRA divides each column of `V = W + alpha · a·b` by its
# norm and multiplies it by a trained magnitude `m`. A column holds the weights of one output, so the norm is over axis
# 0 of the kernel `[in, out]`. Note the conventions of teaching code: the scale is `alpha` and not `alpha / r`, `a` is
# drawn from a normal distribution of variance 1/r, and gradients flow through the norm.


# %%
def lora_init(key, layer):
    inputs, outputs = layer["kernel"].shape
    a = jax.random.normal(key, (inputs, RANK)) / np.sqrt(RANK)
    return {"a": a, "b": jnp.zeros((RANK, outputs))}


def lora_linear(layer, new, x):
    return x @ layer["kernel"] + layer["bias"] + ALPHA * (x @ new["a"] @ new["b"])


def dora_init(key, layer):
    return {**lora_init(key, layer), "m": jnp.linalg.norm(layer["kernel"], axis=0)}


def dora_linear(layer, new, x):
    v = layer["kernel"] + ALPHA * (new["a"] @ new["b"])
    return x @ (new["m"] * v / jnp.linalg.norm(v, axis=0)) + layer["bias"]


METHODS = {"LoRA": (lora_init, lora_linear), "DoRA": (dora_init, dora_linear)}


def scratch_init(method, key, base):
    keys = jax.random.split(key, len(base))
    return {name: METHODS[method][0](key, base[name]) for key, name in zip(keys, base)}


def scratch_model(method, base, new, x):
    linear = METHODS[method][1]
    for name in ("first", "second"):
        x = jax.nn.gelu(linear(base[name], new[name], x))
    return linear(base["third"], new["third"], x)


def scratch_loss(method, base, new, x, y):
    return cross_entropy(scratch_model(method, base, new, x), y)


def scratch_train(method, base, new, x, y, tx, steps):
    opt_state, losses = tx.init(new), []
    gradient = jax.jit(jax.value_and_grad(scratch_loss, argnums=2), static_argnums=0)
    for _ in range(steps):
        value, slope = gradient(method, base, new, x, y)
        updates, opt_state = tx.update(slope, opt_state)
        new, losses = optax.apply_updates(new, updates), [*losses, float(value)]
    return new, losses


# %% [markdown]
# ## The same with the library
#
# The model stays the plain function above. Each convention is an option of the recipe:
#
# | teaching code | lora_jax | its default |
# |---|---|---|
# | the scale is `alpha` | `alpha=ALPHA * RANK`, since the scale is `alpha / rank` | `alpha=None`: scale 1 |
# | `a` is `[in, r]`, normal, variance 1/r | `a` is `[r, in]`; `init=Drawn(function)` | uniform in ±1/√in, as in PEFT |
# | norms over the column of an output | `norm_over="in"`, whatever the layout of the kernel | the same |
# | gradients flow through the norm | `norm_gradient=True` | `False`, as in §4.3 of the DoRA paper |
#
# `init="gaussian"` is yet another convention, PEFT's: a standard deviation of 1/r. The figure shows all three draws.


# %%
def teaching(key, batch, rank, fan_in, fan_out):
    a = jax.random.normal(key, (batch, rank, fan_in)) / np.sqrt(rank)
    return a, jnp.zeros((batch, rank, fan_out))


TEACHING = lora.initializers.Drawn(teaching)
RECIPES = {
    "LoRA": lora.LoRA(RANK, alpha=ALPHA * RANK, init=TEACHING),
    "DoRA": lora.DoRA(RANK, alpha=ALPHA * RANK, init=TEACHING, norm_over="in", norm_gradient=True),
}
adapted = lora.adapt(model)
deltas = {name: lora.init(jax.random.key(1), base, {"kernel": recipe}, model, x) for name, recipe in RECIPES.items()}
print(lora.explain(model, base, deltas["DoRA"], x))

draws = {"teaching: N(0, 1/r)": TEACHING, '"gaussian": N(0, 1/r²)': "gaussian", "default: uniform": "kaiming_uniform"}
figure, axes = plt.subplots(figsize=(7, 2.6))
for label, init in draws.items():
    (node,) = lora.init(jax.random.key(1), base, {"second/kernel": lora.LoRA(RANK, init=init)}, model, x).values()
    bins = np.linspace(-1.6, 1.6, 65)
    axes.hist(node.a.ravel(), bins, histtype="step", linewidth=1.5, label=f"{label}\nstd {node.a.std():.2f}")
axes.set(xlabel="element of a (rank 4, 128 inputs)", ylabel="count", xlim=(-1.6, 3))
axes.legend(loc="center right")
plt.show()

# %% [markdown]
# ## Equal outputs
#
# To compare beyond the start, where `b` is zero and every adapter does nothing, both get the same random factors. Only
# `a` is transposed. The magnitudes are not copied: both compute them from the kernels.


# %%
def copy_factors(delta, new):
    """The delta with the factors of the code from scratch."""
    pairs = {path: new[path.split("/")[0]] for path in delta}
    return {
        path: dataclasses.replace(node, a=jnp.array(pairs[path]["a"].T), b=jnp.array(pairs[path]["b"]))
        for path, node in delta.items()
    }


def difference(one, other):
    """The largest difference, relative to the largest element."""
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    return float(max(jnp.max(jnp.abs(a - b)) for a, b in pairs) / max(jnp.max(jnp.abs(a)) for a, _ in pairs))


points = {}
for method, delta in deltas.items():
    new = scratch_init(method, jax.random.key(2), base)
    for key, layer in zip(jax.random.split(jax.random.key(3), 3), new.values()):
        layer["b"] = 0.1 * jax.random.normal(key, layer["b"].shape)
    points[method] = new, copy_factors(delta, new)
    outputs = scratch_model(method, base, new, x), adapted(base, points[method][1], x)
    print(f"{method}: outputs of both, which differ by {difference(*outputs):.0e}")
    print(np.stack([np.asarray(output[0, :5]) for output in outputs]).round(4))
    assert difference(*outputs) < 1e-5
    assert difference(model(base, x), outputs[0]) > 0.01, "the adapter changes the outputs"

# %% [markdown]
# ## Equal gradients
#
# The gradients of the loss with respect to `a`, `b` and `m` agree in every layer.


# %%
def library_loss(base, delta, batch, key):
    return cross_entropy(adapted(base, delta, batch[0]), batch[1])


for method, (new, delta) in points.items():
    scratch = jax.grad(scratch_loss, argnums=2)(method, base, new, x, y)
    library = jax.grad(library_loss, argnums=1)(base, delta, (x, y), None)
    for path, node in library.items():
        layer = scratch[path.split("/")[0]]
        pairs = {"a": (layer["a"].T, node.a), "b": (layer["b"], node.b)}
        if method == "DoRA":
            pairs["m"] = (layer["m"], node.magnitude)
        errors = {name: difference(*pair) for name, pair in pairs.items()}
        print(f"{method}  {path:14}", *(f"d{name} differs by {error:.0e}  " for name, error in errors.items()))
        assert max(errors.values()) < 1e-4

# %% [markdown]
# ## Equal training runs
#
# Both train from the same start, `b = 0`, with the same optimizer. In the left panel the dashed lines of the library
# lie on those of the code from scratch. The right panel shows their distance: rounding, which training amplifies.


# %%
def library_train(delta):
    state, step = lora.TrainState.create(base, delta, tx, jax.random.key(0)), lora.train_step(library_loss, tx)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, (x, y))
        losses.append(float(metrics["loss"]))
    return state.delta, losses


runs = {}
for method in METHODS:
    new = scratch_init(method, jax.random.key(2), base)
    delta = copy_factors(deltas[method], new)
    runs[method] = scratch_train(method, base, new, x, y, tx, STEPS), library_train(delta)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for color, (method, ((_, scratch), (_, library))) in zip(("#4c78a8", "#f58518"), runs.items()):
    left.plot(scratch, color=color, linewidth=5, alpha=0.35, label=f"{method} from scratch")
    left.plot(library, color=color, linestyle="--", label=f"{method}, lora_jax")
    right.plot(np.abs(np.subtract(scratch, library)) / scratch, color=color, linewidth=1, label=method)
    assert np.allclose(scratch, library, rtol=1e-3)
left.set(xlabel="step", ylabel="training loss", yscale="log")
right.set(xlabel="step", ylabel="relative difference of the losses", yscale="log")
left.legend()
right.legend()
plt.show()

# %% [markdown]
# ## The result
#
# Both classify mirrored digits now. `merge` adds a delta to a copy of the base, so inference costs nothing extra; from
# scratch that is one line a layer. The two merged bases agree too.

# %%
for method, ((new, _), (delta, _)) in runs.items():
    merged, layer = lora.merge(base, delta), new["second"]
    v = base["second"]["kernel"] + ALPHA * (layer["a"] @ layer["b"])
    kernel = v if method == "LoRA" else layer["m"] * v / jnp.linalg.norm(v, axis=0)
    print(f"{method}: mirrored {accuracy(merged, mirrored):.1%}; merged kernels differ by", end=" ")
    print(f"{difference(kernel, merged['second']['kernel']):.0e}")
    assert difference(kernel, merged["second"]["kernel"]) < 1e-3

# %% [markdown]
# ## Why libraries divide the scale by the rank
#
# If you change the rank, do you have to search for the learning rate again? Each curve is a rank. With the teaching
# conventions the curves are shifted: a larger rank gets as far with a smaller learning rate, and diverges sooner. With
# `alpha / r` and the default draw they nearly coincide at small rates, and diverge at about the same one. (`train_many`
# trains all of these runs in one compiled step; the notebook `many_runs` is about it.)

# %%
conventions = {
    "scale alpha, N(0, 1/r)": lambda rank: lora.LoRA(rank, alpha=ALPHA * rank, init=TEACHING),
    "scale alpha / r, uniform": lambda rank: lora.LoRA(rank, alpha=16),
}
ranks = (1, 16) if FAST else (1, 4, 16, 64)
rates = 10 ** (np.linspace(-4, -1, 4 if FAST else 9))
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for axes, (label, recipe) in zip(panels, conventions.items()):
    starts = [lora.init(jax.random.key(4), base, {"(first|second)/kernel": recipe(r)}, model, x) for r in ranks]
    members = [(start, rate) for start in starts for rate in rates]
    states = lora.TrainStates.create(
        base,
        [start for start, _ in members],
        optax.adam,
        jax.random.split(jax.random.key(5), len(members)),
        {"learning_rate": [rate for _, rate in members]},
    )
    step = lora.train_many(library_loss, optax.adam, batch_axes=None)
    for _ in range(STEPS // 4):
        states, metrics = step(states, (x[:512], y[:512]))
    for rank, losses in zip(ranks, metrics["loss"].reshape(len(ranks), -1)):
        axes.plot(rates, losses, marker="o", markersize=4, label=f"rank {rank}")
    axes.set(xlabel=f"learning rate; {label}", xscale="log", yscale="log", ylim=(None, 10))
panels[0].set_ylabel(f"training loss, step {STEPS // 4}")
panels[0].legend()
plt.show()

# %% [markdown]
# ## The other axis
#
# PyTorch stores weights as `[out, in]`. Tutorials that write `weight.norm(dim=0)` there take norms over the *outputs*:
# one magnitude for each input. That is another method, which LyCORIS follows too, and not what the authors' code does.
# It is `norm_over="out"` here: compare the two shapes.

# %%
recipe = dataclasses.replace(RECIPES["DoRA"], norm_over="out")
delta = copy_factors(lora.init(jax.random.key(1), base, {"first/kernel": recipe}, model, x), points["DoRA"][0])
layer, weight = points["DoRA"][0]["first"], base["first"]["kernel"].T  # [out, in]
v = weight + ALPHA * (layer["a"] @ layer["b"]).T
dim0 = jnp.linalg.norm(weight, axis=0) * v / jnp.linalg.norm(v, axis=0)
error = difference(dim0.T, lora.merge(base, delta)["first"]["kernel"])
for name, magnitudes in {"in": points["DoRA"][1], "out": delta}.items():
    print(f"norm_over={name!r}: {magnitudes['first/kernel'].magnitude.size} magnitudes for a kernel [64, 128]")
print(f"weight.norm(dim=0) of [out, in] and norm_over='out' differ by {error:.0e}")
assert error < 1e-5

# %% [markdown]
# ## What the library saves
#
# The DoRA from scratch forms `V`, and a gradient of its size, for every layer in every step. The library computes
# `x·W + s·(x·aᵀ)·b` and the norms from the factors, whatever flows through the norm. LoRA from scratch has nothing to
# save: its two thin products are what the library computes. The figures are the compiler's, for one gradient.


# %%
def gigaflops(gradient, *args):
    return gradient.lower(*args).compile().cost_analysis()["flops"] / 1e9


scratch_gradient = jax.jit(jax.grad(scratch_loss, argnums=2), static_argnums=0)
library_gradient = jax.jit(jax.grad(library_loss, argnums=1))
costs = {}
for method, (new, delta) in points.items():
    costs[f"{method} from scratch"] = gigaflops(scratch_gradient, method, base, new, x, y)
    costs[f"{method}, lora_jax"] = gigaflops(library_gradient, base, delta, (x, y), None)

figure, axes = plt.subplots(figsize=(6, 2))
bars = axes.barh(list(costs), list(costs.values()), color=["#bab0ac", "#4c78a8"] * 2)
axes.bar_label(bars, fmt="%.3f", padding=3, color="#7f7f7f")
axes.set(xlabel="GFLOP of one gradient, 1300 examples")
axes.invert_yaxis()
axes.margins(x=0.15)
plt.show()

# %%
minutes, memory = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {memory:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - [Quickstart](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/quickstart.ipynb): LoRA
#   on a pretrained sentence encoder
# - [Your own model](https://lora-jax.github.io/lora_jax/guides/your_model.html): Linen, NNX, Equinox, Haiku
# - [LoRA](https://lora-jax.github.io/lora_jax/methods/lora.html), [DoRA](https://lora-jax.github.io/lora_jax/methods/dora.html)
#   and [the other methods](https://lora-jax.github.io/lora_jax/methods/index.html): formula, cost, paper
# - [Rank, targets, learning rate](https://lora-jax.github.io/lora_jax/guides/choosing.html)
