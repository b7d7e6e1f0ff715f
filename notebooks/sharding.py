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
# # LoRA on a mesh: eight virtual devices, then a TPU
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/sharding.ipynb)
#
# One places the base on the devices; the delta, its gradients and its optimizer state follow. This notebook makes one
# CPU pretend to be eight devices, trains the same adapter on one device and on a mesh, and shows who holds which part
# of what. The same cells run on a Colab TPU, and with other numbers on a pod.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 2 | 4 | 1 | 1 |
# | memory | 3.2 GB | 3.2 GB | 1.2 GB | 1.2 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. On accelerators the 5 TFLOP of
# this notebook take a few seconds; compilation takes the rest. T4 and v5e-1 are meshes of one device: nothing is
# divided there. *Memory:* on Colab's CPU as here; on an accelerator, arrays take at most 0.5 GB (the base in up to four
# layouts), and the temporaries of the largest step 0.7 GB, by XLA's memory analysis on a CPU.

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
    sh(f"{sys.executable} -m pip install -q ./{SOURCE} 'jax[{extras}]' matplotlib tokenizers")
    sys.path.insert(0, str(SOURCE))

# %% [markdown]
# ## Eight devices
#
# The flag divides the CPU into eight devices. It must be set before JAX starts, that is before anything asks for
# devices; if `jax.devices()` shows one, restart the kernel. On TPUs and GPUs it has no effect: the devices are chips.

# %%
import os

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")

import collections
import re
import resource
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lora_jax as lora
from experiments.models import llama
from experiments.models.options import Options
from experiments.tasks import examples

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # smaller sizes, to test this notebook
WIDTH, LAYERS, STEPS, ROWS, LENGTH = (64, 2, 2, 8, 32) if FAST else (512, 8, 20, 8, 128)
tensor = 2 if jax.device_count() % 2 == 0 else 1
mesh = jax.make_mesh((jax.device_count() // tensor, tensor), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
print(mesh)

# %% [markdown]
# ## The base on the mesh
#
# A Llama with random weights, all layers stacked along a first axis. Rules say which axes of a weight are divided by
# which axis of the mesh. Query, key, value, gate and up are divided by their output (the heads), and the layers that
# read these by their input: that is tensor parallelism. Dividing the other axis along `data`, too, is FSDP: nobody
# holds a whole weight.

# %%
config = llama.LlamaConfig.from_json(
    {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 8,
        "tie_word_embeddings": True,
    }
)
apply_fn, weights = lora.nnx.functional(llama.Llama(config, Options(scan=True), rngs=nnx.Rngs(0)))
RULES = {
    r"(query|key|value|gate|up)/kernel": P(None, "data", "tensor"),
    r"(output|down)/kernel": P(None, "tensor", "data"),
    r"token/embedding": P("tensor", "data"),
    r"scale": P(),  # norms are small: everybody has them
}


def distribute(tree, rules):
    """Puts a tree on the mesh."""

    def sharding(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return NamedSharding(mesh, next(spec for pattern, spec in rules.items() if re.search(pattern, name)))

    return jax.device_put(tree, jax.tree_util.tree_map_with_path(sharding, tree))


base = distribute(weights, RULES)
kernel = base["layers"]["feed_forward"]["up"]["kernel"]
print(kernel.shape, kernel.sharding.spec, "; a device holds", kernel.addressable_shards[0].data.shape)

# %% [markdown]
# ## The delta follows
#
# `delta_shardings` reads the base: an axis that a factor shares with its weight is divided like the weight's axis. The
# axis of the rank is not divided, and what all layers of a device need is where that device's weights are.

# %%
spec = {r"attention/.*/kernel|feed_forward/.*/kernel": lora.LoRA(rank=8, alpha=16)}
tokens = jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)
start = lora.init(jax.random.key(0), base, spec, apply_fn, tokens)
delta = jax.device_put(start, lora.delta_shardings(base, start))
for path, adapter in delta.items():
    a, b = tuple(adapter.a.sharding.spec), tuple(adapter.b.sharding.spec)
    print(f"{path:32} a {adapter.a.shape} {a}  b {adapter.b.shape} {b}")

# %% [markdown]
# A picture of one layer's weights, down and up, each next to its factors. A color is a device; a part with several
# numbers is held by several devices. Compare the sides: `a` is divided like the weight's rows, `b` like its columns.


# %%
def draw(axes, array, title):
    """Draws which devices hold which part of the first layer of a stacked matrix."""
    _, rows, columns = array.shape
    parts = collections.defaultdict(list)
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        parts[tuple(part.indices(size)[:2] for part, size in zip(index[1:], (rows, columns)))].append(device.id)
    for ((top, bottom), (left, right)), ids in parts.items():
        color = plt.cm.Set3(min(ids) % 12)
        axes.add_patch(plt.Rectangle((left, top), right - left, bottom - top, facecolor=color, edgecolor="black"))
        label = ",".join(map(str, sorted(ids)))
        axes.text((left + right) / 2, (top + bottom) / 2, label, ha="center", va="center", fontsize=7, color="black")
    axes.set(xlim=(0, columns), ylim=(rows, 0), xticks=[0, columns], yticks=[0, rows], title=title)


figure, grid = plt.subplots(2, 3, figsize=(7.5, 5), layout="constrained")
for row, name in zip(grid, ("up", "down")):
    adapter = delta[f"layers/feed_forward/{name}/kernel"]
    draw(row[0], base["layers"]["feed_forward"][name]["kernel"], f"{name}: weight [in, out]")
    draw(row[1], adapter.a.swapaxes(1, 2), "a [in, rank]")
    draw(row[2], adapter.b, "b [rank, out]")
plt.show()

# %% [markdown]
# ## The training step
#
# It needs no changes. The batch is divided along `data`; the compiler derives from the inputs' shardings where to
# communicate. The text is synopses of Debian packages, one token per byte.

# %%
adapted, tx = lora.adapt(apply_fn), optax.adam(1e-3)


def loss_fn(base, delta, tokens, key):
    labels = jnp.roll(tokens, -1, axis=1).at[:, -1].set(-1)
    return adapted(base, delta, tokens, labels_BL=labels).sum(), (labels >= 0).sum()


text = "\n".join(examples.load("debian_sections", "train").texts).encode()
batches = np.frombuffer(text, np.uint8)[: STEPS * ROWS * LENGTH].reshape(STEPS, ROWS, LENGTH).astype(np.int32)


def train(base, delta, put):
    state, losses = lora.TrainState.create(base, delta, tx, jax.random.key(1)), []
    for batch in batches:
        state, metrics = step(state, put(batch))
        losses.append(float(metrics["loss"]))
    return state, losses


step = lora.train_step(loss_fn, tx)
state, on_mesh = train(base, delta, lambda batch: jax.device_put(batch, NamedSharding(mesh, P("data"))))
print("loss on the mesh:", *(f"{loss:.4f}" for loss in on_mesh[:3]), "…", f"{on_mesh[-1]:.4f}")
up = state.opt_state[0].mu["layers/feed_forward/up/kernel"].b
print("Adam's first moment of b:", up.sharding.spec)
assert up.sharding == delta["layers/feed_forward/up/kernel"].b.sharding

# %% [markdown]
# The same on one device: the same code, and up to rounding the same losses. They may drift apart slowly, since sums are
# added in another order.

# %%
_, on_one = train(weights, start, lambda batch: batch)
difference = np.abs(np.array(on_mesh) - on_one)
print("loss on one device:", *(f"{loss:.4f}" for loss in on_one[:3]), "…", f"{on_one[-1]:.4f}")
print(f"difference {difference[0]:.1e} in the first step, {difference.max():.1e} at most")
assert difference[0] < 1e-5 and difference.max() < 1e-2

# %% [markdown]
# ## What each device holds
#
# Bytes by part, measured on the arrays' shards. Replicated on all devices, a mesh only computes faster; divided, it
# holds models that fit no single device. The optimizer state of a delta is small in any case.


# %%
def megabytes(tree):
    """Returns the megabytes of each device."""
    sizes = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves(tree):
        for shard in leaf.addressable_shards:
            sizes[shard.device] += shard.data.nbytes / 1e6
    return np.array(list(sizes.values()))


LAYOUTS = {
    "replicated": {"": P()},
    "tensor": {name: P(*(axis if axis == "tensor" else None for axis in spec)) for name, spec in RULES.items()},
    "data and tensor": RULES,
}
figure, grid = plt.subplots(1, 3, figsize=(7.5, 2.8), sharey=True, layout="constrained")
for axes, (name, rules) in zip(grid, LAYOUTS.items()):
    distributed = distribute(weights, rules)
    factors = jax.device_put(start, lora.delta_shardings(distributed, start))
    bottom = np.zeros(jax.device_count())
    for part, tree in {"base": distributed, "delta": factors, "optimizer": tx.init(lora.partition(factors)[0])}.items():
        axes.bar(range(len(bottom)), megabytes(tree), bottom=bottom, label=part)
        bottom += megabytes(tree)
    axes.set(xlabel="device", title=f"divided by {name}" if name != "replicated" else name)
    print(f"{name:16} {bottom.max():6.2f} MB on the fullest device")
grid[0].set_ylabel("memory (MB)")
grid[-1].legend()
plt.show()

# %% [markdown]
# ## What they say to each other
#
# The compiled step lists its collectives. The compiler chooses what to send for a layer: the parts of its weight, or
# sums of partial products. Gradients are summed for the delta only, which makes LoRA cheap on many devices: full
# fine-tuning would send those of every weight.

# %%
compiled = step.lower(state, jax.device_put(batches[0], NamedSharding(mesh, P("data")))).compile()
collectives = re.findall(
    r" (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(", compiled.as_text()
)
print(collections.Counter(collectives))
trained = sum(leaf.size for leaf in jax.tree.leaves(lora.partition(state.delta)[0]))
frozen = sum(leaf.size for leaf in jax.tree.leaves(base))
print(f"gradients: {4 * trained / 1e6:.1f} MB a step; in full fine-tuning {4 * frozen / 1e6:.1f} MB")

# %% [markdown]
# ## QLoRA, and merging
#
# Codes are divided like the weights they stand for, and everything else stays as it is. A merged model has the base's
# shardings: no device ever holds a whole weight.

# %%
quantized = lora.quantize(base, {"kernel": lora.NF4(block=16)}, apply_fn, tokens)
print("codes:", quantized["layers"]["feed_forward"]["up"]["kernel"].codes.sharding.spec)
print(f"base on a device: {megabytes(base).max():.2f} MB, in four bits {megabytes(quantized).max():.2f} MB")
merged = lora.merge(base, state.delta)
assert all(jax.tree.leaves(jax.tree.map(lambda one, other: one.sharding == other.sharding, merged, base)))
print("merged:", merged["layers"]["feed_forward"]["up"]["kernel"].sharding.spec)

# %%
minutes, peak = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {peak:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## The same on a TPU
#
# On Colab choose *Runtime → Change runtime type → v5e-1 TPU* and run all cells again. Nothing changes but the devices:
# one chip is a mesh of (1, 1). On a slice with eight chips (`v5e-8`, or Kaggle's TPU) the mesh is (4, 2), as here. On
# several hosts every process runs the same program, after `jax.distributed.initialize()`, and holds the shards of its
# devices; the studies do this with `--distributed`:
#
# ```
# python -m experiments.run sft --distributed --mesh.fsdp 4 --mesh.tensor 2 --data chat.jsonl --out /shared/run
# ```
#
# ## What next
#
# - [Sharding and pods](https://lora-jax.github.io/lora_jax/guides/sharding.html): sequence parallelism, explicit
#   meshes, `pmap`, restoring onto another mesh, compiling for a slice that you do not have.
# - [`experiments/pods/`](https://github.com/lora-jax/lora_jax/blob/main/experiments/pods/README.md): from creating a
#   slice to copying the adapter back, for Llama 3 8B, Llama 2 70B and Mixtral 8x7B.
# - [`qlora_memory.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/qlora_memory.ipynb): memory on one
#   device first.
# - [Checkpoints](https://lora-jax.github.io/lora_jax/guides/checkpoints.html): save on one mesh, resume on another.
