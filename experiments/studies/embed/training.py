"""The encoder of the study, its vectors, and the training of a method."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

import lora_jax as lora
from experiments.configs.embed import Config
from experiments.errors import UserError
from experiments.models import bert, checkpoint
from experiments.models.formats import make_format
from experiments.objectives.contrastive import contrastive, embeddings
from experiments.studies.embed.pairs import Candidates, Pairs, PairStream
from experiments.studies.embed.retrieval import nearest_others, rank_answers, recall
from experiments.studies.problem import Split, answers
from experiments.training import mesh as meshes
from experiments.training.loop import plan_steps, train
from experiments.training.optimizer import adam
from experiments.training.progress import bar
from experiments.training.run import History, TrainingRun

_LINEAR = r"(attention|feed_forward)/.*kernel"


@dataclass(frozen=True)
class Method:
    """The trained weights of a method.

    Attributes:
      name: The name in tables.
      spec: Recipes by pattern of paths.
      lr: Peak learning rate.
      rules: Formats of quantized weights by pattern of paths.
    """

    name: str
    spec: Mapping[str, Any]
    lr: float
    rules: Mapping[str, Any] = field(default_factory=dict)


def make_method(name: str, config: Config) -> Method:
    """Returns a method by its name in the config's `methods`."""
    if name == "full":
        return Method("full", {"": lora.Full()}, config.full_lr)
    recipe = {"lora": lora.LoRA, "dora": lora.DoRA}[name](config.rank, alpha=config.alpha)
    if config.quantize == "none":
        return Method(name, {_LINEAR: recipe}, config.lora_lr)
    title = f"{name}, {config.quantize} base"
    return Method(title, {_LINEAR: recipe}, config.lora_lr, {_LINEAR: make_format(config.quantize)})


class Encoder:
    """A pretrained encoder on a mesh.

    Args:
      directory: The checkpoint.
      config: The study's config.
      mesh: The device mesh.

    Attributes:
      base: The parameters, on the mesh.
      apply: `apply(base, tokens, mask)`, a vector for each token.
      embed: `embed(base, delta, tokens, mask)`, a vector of length 1 for each text.

    Raises:
      UserError: The checkpoint is damaged or of another architecture, or has fewer positions than the config's lengths.
    """

    def __init__(self, directory: Path, config: Config, mesh: Mesh):
        self._lengths, self._answer_length, self._mesh = config.lengths, config.answer_length, mesh
        self.config = bert.BertConfig.from_json(checkpoint.read_config(directory))
        longest = max(config.lengths[-1], config.answer_length)
        if longest > self.config.positions:
            raise UserError(f"texts of {longest} tokens: {config.model} has only {self.config.positions} positions")
        self.apply, base = lora.nnx.functional(bert.load(directory))
        self.base = meshes.put_weights(mesh, bert.AXES, base)
        self.embed = embeddings(self.apply)
        self._vectors = jax.jit(self.embed, out_shardings=meshes.replicated(mesh))

    def delta(self, key: jax.Array, base: Any, method: Method) -> dict[str, Any]:
        """Initializes the delta of a method on the mesh."""
        return meshes.init_delta(self._mesh, lambda key, base: self._init(key, base, method), key, base)

    def check(self, method: Method) -> None:
        """Raises a UserError if a method does not fit the encoder."""
        try:
            jax.eval_shape(lambda key, base: self._init(key, base, method), jax.random.key(0), self.base)
        except ValueError as error:
            raise UserError(f"{method.name}: {error}") from None

    def _init(self, key: jax.Array, base: Any, method: Method) -> dict[str, Any]:
        return lora.init(key, base, method.spec, self.apply, *self._shapes())

    def quantize(self, method: Method) -> Any:
        """Returns the base of a method."""
        return lora.quantize(self.base, method.rules, self.apply, *self._shapes()) if method.rules else self.base

    def vectors(self, base: Any, delta: Any, texts: Sequence[np.ndarray], lengths: Sequence[int]) -> np.ndarray:
        """Returns the vectors of tokenized texts, `float32[texts, width]`."""

        def answer(*inputs: np.ndarray) -> jax.Array:
            return self._vectors(base, delta, *(meshes.shard_examples(self._mesh, array) for array in inputs))

        return answers(answer, Split(list(texts), np.zeros(len(texts), np.int32)), lengths)

    def rank(self, base: Any, delta: Any, pairs: Pairs) -> tuple[np.ndarray, np.ndarray]:
        """Returns the rank of the answer of each query, and the index of the nearest answer."""
        queries = self.vectors(base, delta, pairs.queries, self._lengths)
        documents = self.vectors(base, delta, pairs.answers, (self._answer_length,))
        return rank_answers(queries, documents, [pair.positive for pair in pairs.texts])

    def find_candidates(self, pairs: Pairs, count: int) -> list[Candidates]:
        """Returns the answer of each pair and `count` hard negatives: those of its record, then the answers of other
        pairs that the base finds nearest to its own."""
        if all(len(negatives) >= count for negatives in pairs.negatives):
            return [(answer, *negatives[:count]) for answer, negatives in zip(pairs.answers, pairs.negatives)]
        documents = self.vectors(self.base, {}, pairs.answers, (self._answer_length,))
        nearest = nearest_others(documents, [pair.positive for pair in pairs.texts], count)
        return [
            (answer, *[*negatives, *(pairs.answers[index] for index in others)][:count])
            for answer, negatives, others in zip(pairs.answers, pairs.negatives, nearest)
        ]

    def _shapes(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        shape = (1, self._lengths[0])
        return jax.ShapeDtypeStruct(shape, np.int32), jax.ShapeDtypeStruct(shape, np.bool)


def fit(
    encoder: Encoder,
    base: Any,
    method: Method,
    pairs: Mapping[str, Pairs],
    candidates: Sequence[Candidates],
    config: Config,
    run: TrainingRun,
    console: Console,
) -> tuple[lora.TrainState, History]:
    """Trains a new delta of a method, or resumes its run.

    Args:
      encoder: The encoder.
      base: Its base, which may be quantized.
      method: The method.
      pairs: The pairs of each split.
      candidates: The answers and hard negatives of the training pairs, from :meth:`Encoder.find_candidates`.
      config: The study's config.
      run: The training run.
      console: The output of the progress bar.

    Returns:
      The final state and the measurements; scores are validation recall@1.
    """
    init_key, train_key = jax.random.split(jax.random.key(config.seed))
    delta = encoder.delta(init_key, base, method)
    stream = PairStream(
        pairs["train"], candidates, config.lengths, config.answer_length, config.batch_size, config.seed
    )
    steps, due = plan_steps(config.epochs, stream.steps_per_epoch, config.steps)
    tx = adam(method.lr, steps, warmup=config.warmup, clip=config.clip)
    loss = contrastive(encoder.embed, temperature=config.temperature)

    def evaluate(state: lora.TrainState) -> float:
        return recall(encoder.rank(state.base, state.delta, pairs["validation"])[0], 1).value

    state = lora.TrainState.create(base, delta, tx, train_key)
    with bar(console, method.name, sum(map(stream.examples, range(steps)))) as progress:
        return train(
            run,
            lora.train_step(loss, tx, has_aux=True),
            state,
            stream,
            steps,
            due=due,
            score=evaluate(state),
            evaluate=evaluate,
            format_score="recall@1 {:.1%}".format,
            bar=progress,
        )
