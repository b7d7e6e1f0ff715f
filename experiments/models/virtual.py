"""Virtual tokens: trained vectors that a model's attention sees before the tokens of every text.

Shapes are in the names: N layers, P virtual tokens, D width, G groups of heads that share keys and values, K width of
a head.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.models import stack
from experiments.models.options import Options


class Shape(NamedTuple):
    """The sizes of a model that those of virtual tokens follow from.

    Attributes:
      layers: The number of layers.
      groups: The number of heads of keys and values.
      head: The width of a head.
      width: The width of the layers' inputs.
    """

    layers: int
    groups: int
    head: int
    width: int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Virtual:
    """Virtual tokens of one form, the same for all texts; the fields of other forms are None.

    Attributes:
      embeddings_PD: Vectors in place of the embeddings of tokens. The model adds to them what it adds to embeddings.
      inputs_NPD: The input of each layer at these tokens, in place of the output of the layer before.
      keys_NPGK: Keys that each layer's attention sees in addition to those of the text, as they enter the scores (with
        RoPE, rotated).
      values_NPGK: The values of these keys.
    """

    embeddings_PD: jax.Array | None = None
    inputs_NPD: jax.Array | None = None
    keys_NPGK: jax.Array | None = None
    values_NPGK: jax.Array | None = None

    @property
    def count(self) -> int:
        """The number of virtual tokens."""
        return self.in_sequence if self.keys_NPGK is None else self.keys_NPGK.shape[1]

    @property
    def in_sequence(self) -> int:
        """The number of virtual tokens that an encoder's layers compute along with the text; 0 for keys and values."""
        vectors = self.embeddings_PD if self.inputs_NPD is None else self.inputs_NPD
        return 0 if vectors is None else vectors.shape[-2]

    @property
    def pair_NPGK(self) -> tuple[jax.Array, jax.Array] | None:
        """The keys and values; None in other forms."""
        if self.keys_NPGK is None or self.values_NPGK is None:
            return None
        return self.keys_NPGK, self.values_NPGK

    def begin(self, x_BLD: jax.Array) -> jax.Array:
        """Returns vectors of texts after those of the virtual tokens of a sequence: zeros if each layer's input is
        replaced."""
        if not self.in_sequence:
            return x_BLD
        shape_BPD = (x_BLD.shape[0], self.in_sequence, x_BLD.shape[2])
        first_PD = jnp.zeros(()) if self.embeddings_PD is None else self.embeddings_PD[None]
        return jnp.concatenate([jnp.broadcast_to(first_PD.astype(x_BLD.dtype), shape_BPD), x_BLD], axis=1)

    def pad(self, x_BL: jax.Array, value: Any) -> jax.Array:
        """Returns a mask or ids of the tokens of texts after `value` for each virtual token of a sequence."""
        return jnp.pad(x_BL, ((0, 0), (self.in_sequence, 0)), constant_values=value)

    def of_layers(self, layers: slice) -> "Virtual":
        """Returns the virtual tokens of some of the layers."""
        by_layer = {name: getattr(self, name) for name in ("inputs_NPD", "keys_NPGK", "values_NPGK")}
        return dataclasses.replace(self, **{name: x[layers] for name, x in by_layer.items() if x is not None})

    def run(self, layers: stack.Layers, x_BLD: jax.Array, *shared: Any, options: Options) -> jax.Array:
        """Returns the output of the last layer of an encoder; see :func:`experiments.models.stack.run`."""
        states = None if self.pair_NPGK is None else stack.unstack_states(self.pair_NPGK, options)
        return stack.run(layers, x_BLD, *shared, states=states, inputs=self.inputs_NPD, options=options)[0]


NO_VIRTUAL = Virtual()
"""No virtual tokens."""
