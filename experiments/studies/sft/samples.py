"""Generates the model's answers to prompts of the validation examples."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import lora_jax as lora
from experiments import generation
from experiments.errors import UserError
from experiments.input.encoding import Encoder
from experiments.input.sources import Records
from experiments.models.options import Options
from experiments.studies.decoder.encoding import read_end_tokens
from experiments.studies.decoder.program import Program
from experiments.training import mesh as meshes

_MAX_PROMPT = 1024  # tokens; longer prompts are left out, because attention runs on one device


@dataclass(frozen=True)
class Prompts:
    """Prompts and reference answers.

    Attributes:
      tokens: `int32[prompts, length]`, padded on the right.
      mask: `bool[prompts, length]`, True at tokens.
      texts: The prompts as text.
      answers: The answers of the examples.
      omitted: The number of prompts that are left out because they are too long.
    """

    tokens: np.ndarray
    mask: np.ndarray
    texts: list[str]
    answers: list[str]
    omitted: int = 0


class Writer:
    """Generates answers with the program's weights on its mesh. Every process has to call it.

    Args:
      program: The program.
      encoder: The encoder of the checkpoint.
      directory: The checkpoint, whose configs have the tokens that end a text.
      records: The first of these records are the prompts, as many as the config's `samples`, except those that are
        longer than a sequence.

    Raises:
      UserError: Prompt and answer are longer than the model supports.
    """

    def __init__(self, program: Program, encoder: Encoder, directory: Path, records: Records):
        config = program.config
        self._config, self._mesh, self._tokenizer = config, program.mesh, encoder.tokenizer
        self._ends = read_end_tokens(directory)
        self.prompts = _prompts(encoder, records, config.samples, min(config.row_length, _MAX_PROMPT))
        # The few prompts are not sharded; only the weights are.
        options = Options(scan=program.model.options.scan, dtype=jnp.dtype(config.dtype))
        family, shape = program.family, program.shape
        self._model = nnx.eval_shape(lambda: family.build(shape, options, rngs=nnx.Rngs(0)))
        slots = self.prompts.tokens.shape[1] + config.new_tokens
        try:
            self._model.check_length(slots)
        except ValueError:
            raise UserError(
                f"--new-tokens {config.new_tokens}: prompt and answer have {slots} tokens, but {config.model} has only "
                f"{self._model.longest} positions"
            ) from None
        apply, _ = lora.nnx.functional(self._model)
        self._step = generation.make_step(lora.adapt(apply))

    def write(self, base: Any, delta: Any) -> list[str]:
        """Generates an answer to each prompt by greedy decoding."""
        if not self.prompts.texts:
            return []
        count, length = self.prompts.tokens.shape
        with jax.default_device(jax.local_devices()[0]):
            cache = jax.tree.map(np.asarray, self._model.cache(count, length + self._config.new_tokens))
        tokens = generation.greedy(
            self._step,
            (base, delta),
            jnp.asarray(self.prompts.tokens),
            jnp.asarray(self.prompts.mask),
            cache=cache,
            new_tokens=self._config.new_tokens,
            eos=self._ends,
            pad=self._ends[0] if self._ends else 0,
        )
        rows = meshes.gather(tokens)
        before_end = np.cumsum(np.isin(rows, self._ends), axis=1) == 0
        decode = self._tokenizer.decode
        return [decode(row[keep].tolist(), skip_special_tokens=True).strip() for row, keep in zip(rows, before_end)]


def _prompts(encoder: Encoder, records: Records, count: int, length: int) -> Prompts:
    rows, answers, omitted = [], [], 0
    for number in range(len(records)):
        if len(rows) == count:
            break
        ids, answer = encoder.encode_prompt(records[number], records.location(number))
        if len(ids) > length:  # without its beginning or end it would be another prompt
            omitted += 1
            continue
        rows.append(ids)
        answers.append(answer)
    longest = max(map(len, rows), default=1)
    tokens, mask = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), longest), bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    texts = [encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip() for ids in rows]
    return Prompts(tokens, mask, texts, answers, omitted)
