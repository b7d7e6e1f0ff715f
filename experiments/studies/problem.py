"""Sentence classification or regression: a pretrained model as a pure function, and tokenized splits."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import lora_jax as lora
from experiments.errors import UserError
from experiments.input import labeled
from experiments.models import classifier, location
from experiments.models.virtual import Shape
from experiments.studies import provenance
from experiments.studies import task as tasks
from experiments.studies.task import CLASSIFICATION, Task
from experiments.tasks import text
from experiments.tasks.batching import assemble, plan
from experiments.training import mesh as meshes

EVALUATION_BATCH = 128
HEAD = r"^classifier/"
PREDICTIONS = "test_predictions.npy"


@dataclass(frozen=True)
class Split:
    """Tokenized examples: the token ids of each, and labels, `int32[examples]` or `float32[examples]`."""

    sequences: list[np.ndarray]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class Problem:
    """A model and a task.

    Attributes:
      apply: `apply(base, tokens, mask) -> (logits, sentence vectors)`.
      base: The pretrained parameters with a classifier, a plain nested dict.
      splits: `train`, `validation` and `test`.
      names: The labels, in the order of the logits; of a regression none.
      lengths: The lengths to which sequences are padded.
      shape: The sizes of the encoder, for virtual tokens.
      digest: A digest of the model and the data.
      task: What trains and scores the outputs.
      reported: What the examples of `test` are.
    """

    apply: Callable
    base: dict[str, Any]
    splits: dict[str, Split]
    names: tuple[str, ...]
    lengths: tuple[int, ...]
    shape: Shape
    digest: str
    task: Task = CLASSIFICATION
    reported: str = "test"

    def rank_one(self, pattern: str) -> int:
        """Returns the number of parameters of LoRA of rank 1 on the kernels that a pattern matches."""
        flat = lora.paths.flatten(self.base)
        return sum(sum(leaf.shape) for path, leaf in zip(flat.paths, flat.leaves) if re.search(pattern, path))

    def with_head(self, kernel: np.ndarray, bias: np.ndarray) -> dict[str, Any]:
        """Returns the base with another classifier."""
        return {**self.base, "classifier": {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}}

    def delta(
        self, key: jax.Array, base: Mapping[str, Any], spec: Mapping[str, Any], mesh: Mesh | None = None
    ) -> dict[str, Any]:
        """Initializes a delta for `base`, on a mesh if there is one."""

        def init(key: jax.Array, base: Any) -> dict[str, Any]:
            return lora.init(key, base, spec, self.apply, *self._shapes())

        return init(key, base) if mesh is None else meshes.init_delta(mesh, init, key, base)

    def prepare(
        self, key: jax.Array, base: Mapping[str, Any], spec: Mapping[str, Any], batches: Sequence[Any]
    ) -> dict[str, Any]:
        """Initializes a delta by initializers that read the inputs of weights, such as EVA; the base does not change.

        Args:
          key: A PRNG key.
          base: The base.
          spec: Recipes by pattern.
          batches: Tuples of tokens and mask.
        """
        changed, delta = lora.prepare(key, base, spec, self.apply, batches)
        if any(one is not other for one, other in zip(jax.tree.leaves(changed), jax.tree.leaves(dict(base)))):
            raise ValueError("The initializers change the base, which is shared with other runs.")
        return delta

    def outputs(
        self, base: Mapping[str, Any], delta: Mapping[str, Any], split: str, mesh: Mesh | None = None
    ) -> np.ndarray:
        """Returns the outputs of the model for each example of a split, `float[examples, outputs]`.

        Args:
          base: The base, on the mesh; it may be quantized.
          delta: The adapters; none is the base alone.
          split: The name of the split.
          mesh: The mesh, which divides the examples; None is one device.
        """
        function = _compiled(self.apply, bool(delta), None if mesh is None or mesh.size == 1 else mesh)

        def answer(*inputs: np.ndarray) -> jax.Array:
            arrays = inputs if mesh is None else [meshes.shard_examples(mesh, array) for array in inputs]
            return (function(base, delta, *arrays) if delta else function(base, *arrays))[0]

        return answers(answer, self.splits[split], self.lengths)

    def check(self, name: str, spec: Mapping[str, Any]) -> None:
        """Raises a UserError if the spec of a method does not fit the base."""
        try:
            jax.eval_shape(lambda key, base: self.delta(key, base, spec), jax.random.key(0), self.base)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None

    def quantize(self, base: Mapping[str, Any], rules: Mapping[str, Any]) -> Any:
        """Quantizes the weights of a base."""
        return lora.quantize(base, rules, self.apply, *self._shapes())

    def _shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape = (1, self.lengths[0])
        return jax.ShapeDtypeStruct(shape, jnp.int32), jax.ShapeDtypeStruct(shape, jnp.bool)


@functools.cache
def _compiled(apply: Callable, adapted: bool, mesh: Mesh | None) -> Callable:
    """Returns one compiled function for all calls, so that each length is compiled once."""
    function = lora.adapt(apply) if adapted else apply
    return jax.jit(function) if mesh is None else jax.jit(function, out_shardings=meshes.replicated(mesh))


def load(
    model: str,
    data: str,
    limits: dict[str, int | None],
    lengths: tuple[int, ...],
    report: Callable[[str], None],
    *,
    regression: bool = False,
    development: bool = False,
) -> Problem:
    """Loads the model and the data.

    Args:
      model: See :func:`experiments.models.location.find`.
      data: See :func:`experiments.input.labeled.load`.
      limits: Number of examples of each split.
      lengths: See :func:`experiments.tasks.batching.plan`. Longer texts are truncated.
      report: Called with lines that describe model and data.
      regression: Whether labels may be numbers. The task then has GLUE's metrics, otherwise the accuracy.
      development: See :func:`experiments.input.labeled.load_splits`.
    Raises:
      UserError: Model or data are missing or malformed, or labels are numbers without `regression`.
    """
    loaded = labeled.load_splits(data, limits, report, development=development)
    names = loaded["train"].names
    if not names and not regression:
        raise UserError(f"{data}: the labels are numbers, expected classes; this study does not fit a regression")
    directory = location.find(model)
    positions = classifier.read_config(directory).positions
    if positions is not None and lengths[-1] > positions:
        raise UserError(f"lengths go up to {lengths[-1]}, but {model} has only {positions} positions")
    tokenizer = text.load_tokenizer(directory)
    splits = {
        name: Split(text.encode(tokenizer, split.texts, lengths[-1]), split.labels) for name, split in loaded.items()
    }
    separator = text.separator(tokenizer) if loaded["train"].are_pairs else None
    network = classifier.load(directory, len(names) or 1, separator)
    apply, base = lora.nnx.functional(network)
    count = sum(leaf.size for leaf in jax.tree.leaves(base))
    report(f"base: {model}, {count:,} parameters with the new head")
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    kinds = f"{len(names)} classes" if names else "numbers"
    report(f"data: {data}, {kinds}; examples: {sizes}")
    digest = provenance.digest(directory, loaded)
    task = tasks.of_data(data, is_regression=not names) if regression else CLASSIFICATION
    reported = "development" if loaded["test"].is_development else "test"
    return Problem(apply, base, splits, names, lengths, network.encoder.shape, digest, task, reported)


def answers(
    function: Callable[[Any, Any], Any],
    split: Split,
    lengths: Sequence[int],
    *,
    advance: Callable[[int], None] = lambda count: None,
) -> np.ndarray:
    """Returns `function(tokens, mask)` for each example of a split, in the order of the split."""
    rows: dict[int, np.ndarray] = {}
    for planned in plan(split.sequences, lengths, EVALUATION_BATCH):
        batch = assemble(planned, split.sequences, split.labels, EVALUATION_BATCH)
        values = np.asarray(function(batch["tokens"], batch["mask"]))
        rows |= zip(planned.indices.tolist(), values)
        advance(len(planned.indices))
    return np.stack([rows[index] for index in range(len(split))])


def accuracy(logits: np.ndarray, split: Split) -> float:
    """Returns the fraction of examples whose largest logit is that of their label."""
    return float(np.mean(logits.argmax(axis=-1) == split.labels))
