"""The optimizer of the studies."""

import optax

import lora_jax as lora
from experiments.training.options import Schedule


def adam(
    lr: float,
    steps: int,
    *,
    warmup: float,
    clip: float | None,
    weight_decay: float = 0.0,
    schedule: Schedule = "linear",
    floor: float = 0.0,
    decay: float = 0.1,
) -> optax.GradientTransformation:
    """Returns AdamW for a delta, with a learning rate schedule and gradient clipping.

    Args:
      lr: The peak learning rate.
      steps: The number of steps of the run.
      warmup: The fraction of the steps in which the learning rate rises linearly from 0; from 1 on, their number.
      clip: The maximum global norm of the gradients; None does not clip.
      weight_decay: 0 is Adam. Factors decay toward the base; magnitudes and gains do not decay
        (:func:`lora_jax.optim.decay_mask`).
      schedule: See :func:`learning_rate`.
      floor: See :func:`learning_rate`.
      decay: See :func:`learning_rate`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> delta = lora.init(jax.random.key(0), {"w": jnp.ones((4, 4))}, {"w": lora.LoRA(2, axes=("in", "out"))})
      >>> train, frozen = lora.partition(delta)
      >>> state = adam(1e-3, 100, warmup=0.1, clip=None).init(train)
    """
    rate = learning_rate(lr, steps, warmup=warmup, schedule=schedule, floor=floor, decay=decay)
    mask = lora.optim.decay_mask if weight_decay else None
    tx = optax.adamw(rate, weight_decay=weight_decay, mask=mask)
    return tx if clip is None else optax.chain(optax.clip_by_global_norm(clip), tx)


def published_rate(hidden_size: int, model_type: str, *, full: bool = False) -> float:
    r"""Returns the learning rate of a published rule: :math:`5 \cdot 10^{-5} \cdot 10 \cdot (2000 / h)^p`.

    Args:
      hidden_size: The width :math:`h` of the model.
      model_type: Of `config.json`. The exponent :math:`p` is 0.0775 for Qwen and 0.781 for Llama; the latter also
        serves for other models.
      full: Whether for full fine-tuning, which has no factor 10.

    Example:
      >>> f"{published_rate(576, 'llama'):.2g}, {published_rate(4096, 'qwen3'):.2g}"
      '0.0013, 0.00047'

    References:
      Schulman et al., `LoRA Without Regret <https://thinkingmachines.ai/blog/lora/>`_, 2025, and the rule of the Tinker
      cookbook (`hyperparam_utils`)
    """
    exponent = 0.0775 if model_type.startswith("qwen") else 0.781
    return 5e-5 * (1 if full else 10) * (2000 / hidden_size) ** exponent


def learning_rate(
    lr: float, steps: int, *, warmup: float, schedule: Schedule = "linear", floor: float = 0.0, decay: float = 0.1
) -> optax.Schedule:
    """Returns the learning rate by step: a linear rise to the peak, then the schedule.

    Args:
      lr: The peak learning rate.
      steps: The number of steps of the run.
      warmup: The fraction of the steps in which the rate rises; from 1 on, the number of these steps.
      schedule: 'linear' and 'cosine' decay to the floor in the remaining steps; 'constant' stays at the peak; 'wsd'
        (warmup, stable, decay) stays at the peak and decays linearly in the last steps.
      floor: The final rate, as a fraction of the peak.
      decay: The fraction of the steps in which 'wsd' decays.

    Example:
      >>> rate = learning_rate(1.0, 100, warmup=0.1, schedule="wsd", floor=0.5, decay=0.2)
      >>> [round(float(rate(step)), 2) for step in (0, 5, 10, 79, 90, 100)]
      [0.0, 0.5, 1.0, 1.0, 0.75, 0.5]

    References:
      Hu et al., `MiniCPM <https://arxiv.org/abs/2404.06395>`_, 2024, §4 (wsd)
    """
    rise = min(round(warmup * steps if warmup < 1 else warmup), steps)
    rest = max(steps - rise, 1)
    up = optax.linear_schedule(0.0, lr, max(rise, 1))
    if schedule == "constant":
        after = optax.constant_schedule(lr)
    elif schedule == "cosine":
        after = optax.cosine_decay_schedule(lr, rest, alpha=floor)
    else:
        fall = rest if schedule == "linear" else min(max(round(decay * steps), 1), rest)
        after = optax.linear_schedule(lr, floor * lr, fall, transition_begin=rest - fall)
    return optax.join_schedules([up, after], [rise])
