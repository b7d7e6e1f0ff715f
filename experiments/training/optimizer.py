"""The optimizer of the studies."""

import optax


def adam(lr: float, steps: int, *, warmup: float, clip: float) -> optax.GradientTransformation:
    """Adam with a learning rate that rises linearly, then falls linearly to 0.

    Args:
      lr: The peak of the learning rate.
      steps: How many there will be.
      warmup: Share of them in which the learning rate rises.
      clip: Largest global norm of a step's gradients.
    """
    rising = round(warmup * steps)
    up = optax.linear_schedule(0.0, lr, max(rising, 1))
    down = optax.linear_schedule(lr, 0.0, max(steps - rising, 1))
    return optax.chain(optax.clip_by_global_norm(clip), optax.adam(optax.join_schedules([up, down], [rising])))
