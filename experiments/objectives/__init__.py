"""Objectives: loss functions for `lora_jax.train_step` that know no trainer, one file each.

Each factory returns `loss(base, delta, batch, key) -> ((loss_sum, weight), metrics)` for
`lora.train_step(loss, tx, has_aux=True)`. `loss_sum` is a sum over examples or tokens and `weight` is their number, so
that microbatches and devices add up to the loss of the whole batch. `metrics` holds sums with the same weight:
`metrics["aux"]["accuracy"] / metrics["weight"]` is a mean. An example without a label, as in a batch that is padded to
its size, counts nowhere.

A reference is any delta: `{}` (the base), a snapshot of the delta or another adapter. The base of the state holds it,
so that it is an argument of the compiled step and never a constant: see
:class:`experiments.objectives.reference.Frozen`.
"""
