"""Texts after prompts made ready: a pretrained decoder as a pure function, and tokenized splits."""

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
from experiments.studies import provenance
from experiments.tasks import continuations, examples, text
from experiments.tasks.batching import NO_LABEL, Batch, assemble, plan
from experiments.tasks.continuations import Continuations
from lora_jax.peft import Names

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Problem:
    """What is learned and from where.

    Attributes:
      family: The architecture.
      options: How the model computes.
      directory: Of the base's checkpoint.
      model: The base; its arrays are in `base`.
      apply: `apply(base, tokens, …)`, the call of :class:`experiments.models.decoder.Decoder`.
      base: The parameters; a plain nested dict.
      names: Of the parameters in the checkpoint.
      tokenizer: The checkpoint's own.
      ends: The tokens that end a text.
      prompts: What a text can be asked for with.
      splits: `train`, `validation` and `test`.
      lengths: What sequences are padded to.
      digest: Of the model and the data: other ones, another digest.
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
        """The token that is put behind a text."""
        return self.ends[0] if self.ends else None

    def batches(self, split: str) -> Iterator[Batch]:
        """A split in its own order."""
        found = self.splits[split]
        for planned in plan(found.sequences, self.lengths, EVALUATION_BATCH):
            yield assemble(planned, found.sequences, found.labels, EVALUATION_BATCH)

    def reload(self, directory: Path) -> dict[str, Any]:
        """The parameters of another checkpoint of this model."""
        return lora.nnx.functional(self.family.load(directory, self.options))[1]


def load(config: Config, report: Callable[[str], None]) -> Problem:
    """Finds and reads the model and the data.

    Args:
      config: Of the study.
      report: Called with a line on each of them.

    Raises:
      UserError: Something is missing or malformed.
    """
    limits = {"train": config.train_examples, "validation": config.validation_examples, "test": config.test_examples}
    read = {split: examples.load(config.data, split, limit) for split, limit in limits.items()}
    directory, family = location.find(config.model), families.FAMILIES[config.family]
    options = Options(scan=True, loss_chunk=config.loss_chunk)  # one layer to compile, however many there are
    model = family.load(directory, options)
    tokenizer = text.load_tokenizer(directory)
    longest = max(config.lengths[-1], config.new_tokens)
    if model.longest is not None and longest > model.longest:
        raise UserError(f"texts go up to {longest} tokens, {config.model} has {model.longest} positions only")
    if tokenizer.get_vocab_size() > model.config.vocab_size:
        raise UserError(
            f"{directory / 'tokenizer.json'}: {tokenizer.get_vocab_size()} tokens, "
            f"the model knows {model.config.vocab_size} only"
        )
    ends = _ends(checkpoint.read_config(directory))
    splits = {
        split: continuations.encode(
            tokenizer,
            [f"{found.names[label]}:" for label in found.labels],
            found.texts,
            config.lengths[-1],
            ends[0] if ends else None,
        )
        for split, found in read.items()
    }
    apply, base = lora.nnx.functional(model)
    sizes = ", ".join(f"{len(found):,} {split}" for split, found in splits.items())
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
        tuple(f"{name}:" for name in read["train"].names),
        splits,
        config.lengths,
        provenance.digest(directory, read),
    )


def _ends(config: Mapping[str, Any]) -> tuple[int, ...]:
    """`eos_token_id` of a `config.json`: a number, several, or none."""
    found = config.get("eos_token_id")
    return () if found is None else tuple(found) if isinstance(found, list) else (int(found),)
