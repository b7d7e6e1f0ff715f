"""One small training step on the default device. `lora-jax doctor` runs it in a process of its own.

A broken driver can end the process or never answer, so that each part prints a line of JSON when it is done.
"""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lora_jax.adapters.lowrank import LoRA
from lora_jax.merging import merge
from lora_jax.spec import init
from lora_jax.training import TrainState, train_step
from lora_jax.transform.adapt import adapt

DEFAULTS = {
    "jax_enable_x64": False,
    "jax_default_matmul_precision": None,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_disable_jit": False,
    "jax_debug_nans": False,
}
"""JAX's settings that change numbers or speed, with their defaults."""


def describe_devices() -> dict[str, Any]:
    """Describes the devices of JAX, the memory of the first one in bytes, and the settings that are not the default.

    Raises:
      RuntimeError: JAX cannot use the platform that the environment selects.
    """
    device = jax.local_devices()[0]
    memory = device.memory_stats() or {}
    settings = {name: getattr(jax.config, name) for name in DEFAULTS}
    return {
        "platform": jax.default_backend(),
        "kind": device.device_kind,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "limit": memory.get("bytes_limit"),
        "used": memory.get("bytes_in_use"),
        "settings": {name: value for name, value in settings.items() if value != DEFAULTS[name]},
    }


def train() -> dict[str, Any]:
    """Trains a LoRA for two steps.

    Returns:
      The seconds of the first step (with compilation) and of the second one, the losses before and after the first
      step, and the largest relative difference between the outputs of the adapted and the merged model.
    """

    def model(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["kernel"]

    def loss(base: Any, delta: Any, batch: tuple[jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        return jnp.mean((adapted(base, delta, batch[0]) - batch[1]) ** 2)

    keys = jax.random.split(jax.random.key(0), 4)
    base = {"kernel": jax.random.normal(keys[0], (64, 32), jnp.float32)}
    x, y = jax.random.normal(keys[1], (16, 64), jnp.float32), jax.random.normal(keys[2], (16, 32), jnp.float32)
    adapted, tx = adapt(model), optax.sgd(1e-2)
    delta = init(keys[3], base, {"kernel": LoRA(4, alpha=8)}, model, x)
    step, state = train_step(loss, tx), TrainState.create(base, delta, tx, keys[3])
    seconds, losses = [], []
    for _ in range(2):
        start = time.perf_counter()
        state, metrics = step(state, (x, y))
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - start)
    merged, unmerged = model(merge(base, state.delta), x), adapted(base, state.delta, x)
    difference = float(jnp.abs(merged - unmerged).max() / jnp.abs(merged).max())
    return {"seconds": seconds, "losses": losses, "difference": difference}


def main() -> None:
    """Prints the devices, then the training step, each as a line of JSON; an error ends the output as a line, too."""
    try:
        for part in (describe_devices, train):
            print(json.dumps(part()), flush=True)
    except Exception as error:  # whatever a driver or a plugin raises
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}))


if __name__ == "__main__":
    main()
