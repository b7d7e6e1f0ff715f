"""Measures the memory of loops over a quantized base: `python -m experiments.benchmarks.loops`.

Two programs of a model of SmolLM2-135M's shape (float32, random weights): greedy decoding after a prompt, and a LoRA
training step that accumulates gradients over microbatches. Each with an NF4 base, with the same base dequantized before
the loop, and with a float base. Each program has a line with XLA's analysis of its memory in MiB, for which it does not
run. `--rounds` also measures seconds; the bases alternate in one process. The results are those of this platform.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import lora_jax as lora
from experiments import flags, generation, startup
from experiments.models.llama import Llama, LlamaConfig
from experiments.models.options import Options

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M's shape without its number of layers."""

KERNELS = r"^layers/.*/kernel$"
"""The paths of the linear layers, which are quantized and adapted."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The programs to compile and to measure."""

    layers: int = 30
    """Number of layers; 30 is SmolLM2-135M."""
    scan: bool = False
    """Whether layers are stacked and scanned, not unrolled."""
    prompt: int = 16
    """Tokens of the prompt."""
    new_tokens: int = 64
    """Tokens to decode."""
    tokens: int = 128
    """Tokens of each training sequence."""
    accumulate: int = 4
    """Microbatches of one sequence in a training step."""
    bases: tuple[str, ...] = ("NF4", "dequantized before", "float")
    """The bases to measure."""
    rounds: int = 0
    """Number of timed runs of each program; 0 only compiles."""

    @property
    def shape(self) -> LlamaConfig:
        return LlamaConfig.from_json(SHAPE | {"num_hidden_layers": self.layers})


def programs(config: Config) -> dict[str, tuple[Any, Callable[[], tuple[Any, ...]]]]:
    """Returns each compiled program and a function that creates its arguments."""
    options = Options(scan=config.scan)
    model = nnx.eval_shape(lambda: Llama(config.shape, options, rngs=nnx.Rngs(0)))
    apply, floats = lora.nnx.functional(model)
    floats = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), floats)
    example = jax.ShapeDtypeStruct((1, config.tokens), jnp.int32)
    spec, adapted, tx = {KERNELS: lora.LoRA(8)}, lora.adapt(apply), optax.adamw(1e-4)

    def random(key: jax.Array) -> Any:
        leaves, treedef = jax.tree.flatten(floats)
        keys = jax.random.split(key, len(leaves))
        return treedef.unflatten([0.02 * jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves)])

    def quantized(key: jax.Array) -> Any:
        return lora.quantize(random(key), {KERNELS: lora.NF4()}, apply, example)

    def create(base: Any) -> lora.TrainState:
        key = jax.random.key(0)
        return lora.TrainState.create(base, lora.init(key, base, spec, apply, example), tx, key)

    def decode(read: Callable, state: lora.TrainState, tokens: jax.Array) -> jax.Array:
        cache = model.cache(1, config.prompt + config.new_tokens)
        step = generation.make_step(adapted)
        params = (read(state.base), state.delta)
        return generation.greedy(step, params, tokens, cache=cache, new_tokens=config.new_tokens)

    def train(read: Callable, state: lora.TrainState, tokens: jax.Array) -> Any:
        def loss(base: Any, delta: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
            return jnp.mean(adapted(base, delta, tokens, labels_BL=tokens))

        read_state = dataclasses.replace(state, base=read(state.base))
        state, metrics = lora.train_step(loss, tx, accumulate=config.accumulate)(read_state, tokens)
        return state.delta, state.opt_state, metrics["loss"]

    def arguments(make_base: Callable, shape: tuple[int, ...]) -> tuple[lora.TrainState, jax.Array]:
        return create(make_base(jax.random.key(1))), jnp.ones(shape, jnp.int32)

    bases = {"NF4": (quantized, lambda base: base), "dequantized before": (quantized, lora.dequantize)}
    bases["float"] = (random, lambda base: base)
    bases = {name: bases[name] for name in config.bases}
    tasks = {"decode": (decode, (1, config.prompt)), "train": (train, (config.accumulate, config.tokens))}
    compiled = {}
    for task, (function, shape) in tasks.items():
        for name, (base, read) in bases.items():
            make = functools.partial(arguments, base, shape)
            run = jax.jit(functools.partial(function, read))
            compiled[f"{task}, {name}"] = run.lower(*jax.eval_shape(make)).compile(), make
    return compiled


def seconds(compiled: dict[str, tuple[Any, Callable]], rounds: int) -> dict[str, list[float]]:
    """Measures the seconds of each run; the programs alternate."""
    arguments = {name: jax.jit(make)() for name, (_, make) in compiled.items()}
    measured: dict[str, list[float]] = {name: [] for name in compiled}
    for number in range(rounds + 1):
        for name, (run, _) in compiled.items():
            start = time.perf_counter()
            jax.block_until_ready(run(*arguments[name]))
            if number > 0:  # the first warms up
                measured[name].append(time.perf_counter() - start)
    return measured


def main(config: Config) -> int:
    """Compiles, runs, prints, and returns the exit status."""
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {config}")
    compiled = programs(config)
    measured = seconds(compiled, config.rounds) if config.rounds else {}
    print(f"{'':28}{'arguments':>12}{'temporaries':>12}" + (f"{'median s':>12}{'min s':>12}" if measured else ""))
    for name, (run, _) in compiled.items():
        memory = run.memory_analysis()
        line = f"{memory.argument_size_in_bytes / 2**20:12.1f}{memory.temp_size_in_bytes / 2**20:12.1f}"
        if measured:
            line += f"{statistics.median(measured[name]):12.3f}{min(measured[name]):12.3f}"
        print(f"{name:28}{line}")
    return 0


if __name__ == "__main__":
    program = "python -m experiments.benchmarks.loops"
    sys.exit(startup.run(program, lambda: main(flags.parse(Config(), program, description=__doc__))))
