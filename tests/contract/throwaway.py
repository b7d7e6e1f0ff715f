"""Three adapters that no paper has, to show that the contract carries what adapters may hold.

One has frozen float leaves and a gain, one an integer leaf, one a block axis. Each is a class and a recipe, as in a
user's own package: public names only, and nothing in the library knows of them.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

import lora_jax as lora
from lora_jax.adapters import BATCH, IN, OUT, Factor, frozen, in_and_out, sizes, static, trained


def by_role(weight, axes):
    """The sizes of the batch, in and out axes."""
    return [sizes(weight.shape, axes, role) for role in (BATCH, IN, OUT)]


@lora.adapter("test.FrozenPair", sizes=("pair",))
class FrozenPair(lora.Adapter):
    """A frozen random pair with a trained diagonal between, and a trained gain of each output."""

    diagonal: jax.Array = trained("batch pair")
    gain: jax.Array = trained("batch out")
    a: jax.Array = frozen("batch pair in")
    b: jax.Array = frozen("batch pair out")
    axes: tuple[str, ...] = static()

    def factored(self, weight):
        return self.form(self.factor("a"), self.factor("diagonal"), self.factor("b"), gains=(self.factor("gain"),))

    def identity_like(self, weight):
        return dataclasses.replace(self, diagonal=jnp.zeros_like(self.diagonal), gain=jnp.ones_like(self.gain))


@dataclasses.dataclass(frozen=True)
class FrozenPairRecipe(lora.Recipe):
    axes: tuple[str, ...] | None = None
    rank: int = 2

    def create(self, key, weight, axes):
        axes = in_and_out("FrozenPair", axes, weight.shape)
        batch, in_sizes, out_sizes = by_role(weight, axes)
        one, two = jax.random.split(key)
        return FrozenPair(
            diagonal=jnp.zeros((*batch, self.rank)),
            gain=jnp.ones((*batch, *out_sizes)),
            a=jax.random.normal(one, (*batch, self.rank, *in_sizes)) * 0.1,
            b=jax.random.normal(two, (*batch, self.rank, *out_sizes)) * 0.1,
            axes=axes,
        )


@lora.adapter("test.Picked", sizes=("pick",))
class Picked(lora.Adapter):
    """Rows of ΔW for a few picked inputs; which ones is an integer leaf."""

    rows: jax.Array = trained("batch pick out")
    picked: jax.Array = trained("pick")  # integers never train, whatever the declaration
    count: tuple[int, ...] = static("in")
    axes: tuple[str, ...] = static()

    def factored(self, weight):
        onehot = jax.nn.one_hot(self.picked, math.prod(self.count), dtype=self.rows.dtype)
        onehot = onehot.reshape(self.picked.shape[0], *self.count)
        return self.form(Factor(onehot, ("pick", *self.labels("count"))), self.factor("rows"))

    def identity_like(self, weight):
        return dataclasses.replace(self, rows=jnp.zeros_like(self.rows))


@dataclasses.dataclass(frozen=True)
class PickedRecipe(lora.Recipe):
    axes: tuple[str, ...] | None = None
    number: int = 2

    def create(self, key, weight, axes):
        axes = in_and_out("Picked", axes, weight.shape)
        batch, in_sizes, out_sizes = by_role(weight, axes)
        return Picked(
            rows=jnp.zeros((*batch, self.number, *out_sizes)),
            picked=jax.random.permutation(key, math.prod(in_sizes))[: self.number].astype(jnp.int32),
            count=in_sizes,
            axes=axes,
        )


@lora.adapter("test.Blocked", sizes=("half", "part"))
class Blocked(lora.Adapter):
    """A low-rank term for each half of the last out axis: an axis with labels of its own."""

    a: jax.Array = trained("batch half rank in")
    b: jax.Array = trained("batch half rank part")  # the out axes, the last one halved
    out: tuple[int, ...] = static("out")
    axes: tuple[str, ...] = static()

    def factored(self, weight):
        *others, last = self.labels("out")
        lead = self.labels("b")[:-1]
        b = Factor(self.b.reshape(*self.b.shape[:-1], *self.out[:-1], self.out[-1] // 2), (*lead, *others, last))
        form = self.form(self.factor("a"), b)
        return dataclasses.replace(form, labels=tuple(("half", x) if x == last else (x,) for (x,) in form.labels))

    def identity_like(self, weight):
        return dataclasses.replace(self, a=jnp.zeros_like(self.a), b=jnp.zeros_like(self.b))


@dataclasses.dataclass(frozen=True)
class BlockedRecipe(lora.Recipe):
    axes: tuple[str, ...] | None = None
    rank: int = 2

    def create(self, key, weight, axes):
        axes = in_and_out("Blocked", axes, weight.shape)
        batch, in_sizes, out_sizes = by_role(weight, axes)
        return Blocked(
            a=jax.random.normal(key, (*batch, 2, self.rank, *in_sizes)) * 0.1,
            b=jnp.zeros((*batch, 2, self.rank, math.prod(out_sizes) // 2)),
            out=out_sizes,
            axes=axes,
        )
