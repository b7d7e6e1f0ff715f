"""The optimizer of the studies."""

import optax


def adam(
    lr: float, steps: int, *, warmup: float, clip: float, weight_decay: float = 0.0
) -> optax.GradientTransformation:
    """AdamW with a learning rate that rises linearly, then falls linearly to 0.

    Args:
      lr: The peak of the learning rate.
      steps: How many there will be.
      warmup: Share of them in which the learning rate rises.
      clip: Largest global norm of a step's gradients.
      weight_decay: 0 makes it Adam.
    """
    rising = round(warmup * steps)
    up = optax.linear_schedule(0.0, lr, max(rising, 1))
    down = optax.linear_schedule(lr, 0.0, max(steps - rising, 1))
    schedule = optax.join_schedules([up, down], [rising])
    return optax.chain(optax.clip_by_global_norm(clip), optax.adamw(schedule, weight_decay=weight_decay))
