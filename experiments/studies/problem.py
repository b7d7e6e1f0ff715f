"""Sentence classification made ready: a pretrained classifier as a pure function, and tokenized splits."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import lora_jax as lora
from experiments.errors import UserError
from experiments.models import checkpoint, classifier, location
from experiments.studies import provenance
from experiments.tasks import examples, text
from experiments.tasks.batching import assemble, plan
from experiments.training import mesh as meshes

EVALUATION_BATCH = 128
HEAD = r"^classifier/"


@dataclass(frozen=True)
class Split:
    """Tokenized examples: token ids, an array each, and `int32[examples]` labels."""

    sequences: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class Problem:
    """What is learned and from where.

    Attributes:
      apply: `apply(base, tokens, mask) -> (logits, sentence vectors)`.
      base: The pretrained parameters with a classifier; a plain nested dict.
      splits: `train`, `validation` and `test`.
      names: The labels in the order of the logits.
      lengths: What sequences are padded to.
      digest: Of the model and the data: other ones, another digest.
    """

    apply: Callable
    base: dict[str, Any]
    splits: dict[str, Split]
    names: tuple[str, ...]
    lengths: tuple[int, ...]
    digest: str

    def with_head(self, kernel: np.ndarray, bias: np.ndarray) -> dict[str, Any]:
        """The base with this classifier in place of the one that starts at zero."""
        return {**self.base, "classifier": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}

    def delta(
        self, key: jax.Array, base: Mapping[str, Any], spec: Mapping[str, Any], mesh: Mesh | None = None
    ) -> dict[str, Any]:
        """A new delta on `base`, which lies on a mesh or not."""

        def make(key: jax.Array, base: Any) -> dict[str, Any]:
            return lora.init(key, base, spec, self.apply, *self._shapes())

        return make(key, base) if mesh is None else meshes.init_delta(mesh, make, key, base)

    def check(self, name: str, spec: Mapping[str, Any]) -> None:
        """Raises a UserError where a spec, of a method of this name, does not fit the base."""
        try:
            jax.eval_shape(lambda key, base: self.delta(key, base, spec), jax.random.key(0), self.base)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None

    def quantized(self, base: Mapping[str, Any], rules: Mapping[str, Any]) -> Any:
        """The base with quantized weights."""
        return lora.quantize(base, rules, self.apply, *self._shapes())

    def _shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape = (1, self.lengths[0])
        return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)


def load(
    model: str,
    data: str,
    limits: dict[str, int | None],
    lengths: tuple[int, ...],
    report: Callable[[str], None],
) -> Problem:
    """Finds and reads the model and the data.

    Args:
      model: See `experiments.models.location.find`.
      data: See `experiments.tasks.examples.load`.
      limits: How many examples of each split.
      lengths: See `experiments.tasks.batching.plan`; longer texts are cut to the last one.
      report: Called with a line on each of them.

    Raises:
      UserError: Something is missing or malformed.
    """
    read = {split: examples.load(data, split, limit) for split, limit in limits.items()}
    names = read["train"].names
    directory = location.find(model)
    positions = checkpoint.read_config(directory).get("max_position_embeddings", lengths[-1])
    if lengths[-1] > positions:
        raise UserError(f"lengths go up to {lengths[-1]}, {model} has {positions} positions only")
    tokenizer = text.load_tokenizer(directory)
    splits = {
        split: Split(text.encode(tokenizer, found.texts, lengths[-1]), found.labels) for split, found in read.items()
    }
    apply, base = lora.nnx.functional(classifier.load(directory, len(names)))
    count = sum(leaf.size for leaf in jax.tree.leaves(base))
    report(f"base: {model}, {count:,} parameters with the new head")
    sizes = ", ".join(f"{len(found):,} {split}" for split, found in splits.items())
    report(f"data: {data}, {len(names)} classes; examples: {sizes}")
    return Problem(apply, base, splits, names, lengths, provenance.digest(directory, read))


def answers(
    function: Callable[[Any, Any], Any],
    split: Split,
    lengths: Sequence[int],
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """What `function(tokens, mask)` returns for each example of a split, in the split's order."""
    rows: dict[int, np.ndarray] = {}
    for planned in plan(split.sequences, lengths, EVALUATION_BATCH):
        batch = assemble(planned, split.sequences, split.labels, EVALUATION_BATCH)
        found = np.asarray(function(batch["tokens"], batch["mask"]))
        rows |= zip(planned.indices.tolist(), found)
        advance(len(planned.indices))
    return np.stack([rows[index] for index in range(len(split))])


def accuracy(logits: np.ndarray, split: Split) -> float:
    """The share of examples whose largest logit is their label's."""
    return float(np.mean(logits.argmax(axis=-1) == split.labels))
