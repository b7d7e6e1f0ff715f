"""Three adapters that no paper has, to show that the contract carries what adapters may hold.

One has frozen float leaves and a gain, one an integer leaf, one a block axis. Each is a class and a
recipe, as a family under `lora_jax/adapters/` would be; nothing else knows of them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from lora_jax.adapters.factored import Factor, Factored
from lora_jax.adapters.protocol import BATCH, IN, LOOKUP, OUT, Adapter, Recipe, adapter, frozen, static, trained


def plain(axes):
    """Roles without the difference between contracted and indexed axes."""
    return tuple(IN if role == LOOKUP else role for role in axes)


def labels(axes, role):
    return tuple(str(i) for i, r in enumerate(axes) if r == role)


def sizes(weight, axes, role):
    return tuple(n for n, r in zip(weight.shape, axes) if r == role)


def shape_of(axes, batch, ins, out):
    queues = {BATCH: iter(batch), IN: iter(ins), OUT: iter(out)}
    return tuple(next(queues[role]) for role in axes)


@adapter("test.FrozenPair")
class FrozenPair(Adapter):
    """A frozen random pair with a trained diagonal between, and a trained gain of each output."""

    diagonal: jax.Array = trained()
    gain: jax.Array = trained()
    a: jax.Array = frozen()
    b: jax.Array = frozen()
    axes: tuple[str, ...] = static()

    def shape(self):
        lead = self.axes.count(BATCH)
        return shape_of(self.axes, self.a.shape[:lead], self.a.shape[lead + 1 :], self.b.shape[lead + 1 :])

    def factored(self, weight):
        lead = labels(self.axes, BATCH)
        out = (*lead, *labels(self.axes, OUT))
        return Factored(
            labels=tuple((str(i),) for i in range(weight.ndim)),
            factors=(
                Factor(self.a, (*lead, "pair", *labels(self.axes, IN))),
                Factor(self.diagonal, (*lead, "pair")),
                Factor(self.b, (*lead, "pair", *labels(self.axes, OUT))),
            ),
            gains=(Factor(self.gain, out),),
        )


@dataclasses.dataclass(frozen=True)
class FrozenPairRecipe(Recipe):
    axes: tuple[str, ...] | None = None
    rank: int = 2

    def create(self, key, weight, axes):
        axes = plain(axes)
        lead, ins, out = (sizes(weight, axes, role) for role in (BATCH, IN, OUT))
        one, two = jax.random.split(key)
        return FrozenPair(
            diagonal=jnp.zeros((*lead, self.rank)),
            gain=jnp.ones((*lead, *out)),
            a=jax.random.normal(one, (*lead, self.rank, *ins)) * 0.1,
            b=jax.random.normal(two, (*lead, self.rank, *out)) * 0.1,
            axes=axes,
        )


@adapter("test.Picked")
class Picked(Adapter):
    """Rows of ΔW for a few picked inputs; which ones is an integer leaf."""

    rows: jax.Array = trained()
    picked: jax.Array = trained()  # integers never train, whatever the declaration
    count: tuple[int, ...] = static()
    axes: tuple[str, ...] = static()

    def shape(self):
        lead = self.axes.count(BATCH)
        return shape_of(self.axes, self.rows.shape[:lead], self.count, self.rows.shape[lead + 1 :])

    def factored(self, weight):
        lead = labels(self.axes, BATCH)
        onehot = jax.nn.one_hot(self.picked, math.prod(self.count), dtype=self.rows.dtype)
        onehot = onehot.reshape(self.picked.shape[0], *self.count)
        return Factored(
            labels=tuple((str(i),) for i in range(weight.ndim)),
            factors=(
                Factor(onehot, ("pick", *labels(self.axes, IN))),
                Factor(self.rows, (*lead, "pick", *labels(self.axes, OUT))),
            ),
        )


@dataclasses.dataclass(frozen=True)
class PickedRecipe(Recipe):
    axes: tuple[str, ...] | None = None
    number: int = 2

    def create(self, key, weight, axes):
        axes = plain(axes)
        lead, ins, out = (sizes(weight, axes, role) for role in (BATCH, IN, OUT))
        return Picked(
            rows=jnp.zeros((*lead, self.number, *out)),
            picked=jax.random.permutation(key, math.prod(ins))[: self.number].astype(jnp.int32),
            count=ins,
            axes=axes,
        )


@adapter("test.Blocked")
class Blocked(Adapter):
    """A low-rank term for each half of the last out axis."""

    a: jax.Array = trained()
    b: jax.Array = trained()
    axes: tuple[str, ...] = static()

    def shape(self):
        lead = self.axes.count(BATCH)
        out = self.b.shape[lead + 2 :]
        out = (*out[:-1], 2 * out[-1])
        return shape_of(self.axes, self.a.shape[:lead], self.a.shape[lead + 2 :], out)

    def factored(self, weight):
        lead, ins, out = (labels(self.axes, role) for role in (BATCH, IN, OUT))
        return Factored(
            labels=tuple(("half", str(i)) if str(i) == out[-1] else (str(i),) for i in range(weight.ndim)),
            factors=(
                Factor(self.a, (*lead, "half", "rank", *ins)),
                Factor(self.b, (*lead, "half", "rank", *out)),
            ),
        )


@dataclasses.dataclass(frozen=True)
class BlockedRecipe(Recipe):
    axes: tuple[str, ...] | None = None
    rank: int = 2

    def create(self, key, weight, axes):
        axes = plain(axes)
        lead, ins, out = (sizes(weight, axes, role) for role in (BATCH, IN, OUT))
        out = (*out[:-1], out[-1] // 2)
        return Blocked(
            a=jax.random.normal(key, (*lead, 2, self.rank, *ins)) * 0.1,
            b=jnp.zeros((*lead, 2, self.rank, *out)),
            axes=axes,
        )
