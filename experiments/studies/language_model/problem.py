"""Language modeling: a pretrained decoder as a pure function, and tokenized splits."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import lora_jax as lora
from experiments.configs.language_model import Config
from experiments.errors import UserError
from experiments.models import checkpoint, families, location
from experiments.models.decoder import Decoder
from experiments.models.options import Options
from experiments.pretrained.files import open_files
from experiments.studies import provenance
from experiments.tasks import continuations, examples, text
from experiments.tasks.batching import NO_LABEL, Batch, assemble, plan
from experiments.tasks.continuations import Continuations
from lora_jax.peft import Names

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Problem:
    """A model and a language modeling task.

    Attributes:
      family: The architecture.
      options: The options of the model's computation.
      directory: The checkpoint of the base.
      model: The base model; `base` has its arrays.
      apply: `apply(base, tokens, …)`, the call of :class:`experiments.models.decoder.Decoder`.
      base: The parameters, a plain nested dict.
      names: The names of the parameters in the checkpoint.
      tokenizer: The checkpoint's tokenizer.
      ends: The tokens that end a text.
      prompts: The prompts for generation.
      splits: `train`, `validation` and `test`.
      lengths: The lengths to which sequences are padded.
      digest: A digest of the model and the data.
    """

    family: families.Family
    options: Options
    directory: Path
    model: Decoder
    apply: Callable
    base: dict[str, Any]
    names: Names
    tokenizer: Tokenizer
    ends: tuple[int, ...]
    prompts: tuple[str, ...]
    splits: Mapping[str, Continuations]
    lengths: tuple[int, ...]
    digest: str

    @property
    def end(self) -> int | None:
        """The token that is added at the end of a text."""
        return self.ends[0] if self.ends else None

    def batches(self, split: str) -> Iterator[Batch]:
        """Yields the batches of a split in its order."""
        data = self.splits[split]
        for planned in plan(data.sequences, self.lengths, EVALUATION_BATCH):
            yield assemble(planned, data.sequences, data.labels, EVALUATION_BATCH)

    def reload(self, directory: Path) -> dict[str, Any]:
        """Loads the parameters of another checkpoint of this model."""
        return lora.nnx.functional(self.family.load(directory, self.options))[1]


def load(config: Config, report: Callable[[str], None]) -> Problem:
    """Finds and reads the model and the data.

    Args:
      config: Of the study.
      report: Called with a line on each of them.

    Raises:
      UserError: Something is missing or malformed.
    """
    loaded = {split: examples.load(config.data, split, limit) for split, limit in examples.limits(config).items()}
    directory, family = location.find(config.model), families.FAMILIES[config.family]
    options = Options(scan=True, loss_chunk=config.loss_chunk)  # compiles a single layer
    model = family.load(directory, options)
    tokenizer = text.load_tokenizer(directory)
    longest = max(config.lengths[-1], config.new_tokens)
    if model.longest is not None and longest > model.longest:
        raise UserError(f"texts have up to {longest} tokens, but {config.model} has only {model.longest} positions")
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        where = open_files(directory).where("tokenizer.json")
        raise UserError(
            f"{where}: {tokenizer.get_vocab_size()} tokens, but the model has only {model.config.vocab_size}"
        )
    ends = _ends(checkpoint.read_config(directory))
    splits = {
        name: continuations.encode(
            tokenizer,
            [f"{split.names[label]}:" for label in split.labels],
            split.texts,
            config.lengths[-1],
            ends[0] if ends else None,
        )
        for name, split in loaded.items()
    }
    apply, base = lora.nnx.functional(model)
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in splits.items())
    tokens = sum(int(np.sum(labels != NO_LABEL)) for labels in splits["train"].labels)
    report(f"base: {config.model}, {config.family}, {model.config.vocab_size:,} tokens in its vocabulary")
    report(f"data: {config.data}; examples: {sizes}; {tokens:,} tokens to learn from")
    return Problem(
        family,
        options,
        directory,
        model,
        apply,
        base,
        family.names(model.config),
        tokenizer,
        ends,
        tuple(f"{name}:" for name in loaded["train"].names),
        splits,
        config.lengths,
        provenance.digest(directory, loaded),
    )


def _ends(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Returns the end tokens of a `config.json`."""
    value = config.get("eos_token_id")
    return () if value is None else tuple(value) if isinstance(value, list) else (int(value),)
