"""What a model answers to prompts of the validation examples."""

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
from experiments.models import checkpoint
from experiments.models.options import Options
from experiments.studies.sft.program import Program
from experiments.training import mesh as meshes

_GENERATION = "generation_config.json"
_LONGEST = 512  # tokens of a prompt, whose end is kept: every token sees every other at once, on one device


@dataclass(frozen=True)
class Prompts:
    """Texts that are to be gone on from.

    Attributes:
      tokens: `int32[prompts, length]`, padded on the right.
      mask: `bool[prompts, length]`, True at tokens.
      texts: The prompts as text.
      answers: What the examples have in the place of an answer.
    """

    tokens: np.ndarray
    mask: np.ndarray
    texts: list[str]
    answers: list[str]


class Writer:
    """Generates with the program's weights, wherever they lie; every process has to call it.

    Args:
      program: Has the model.
      encoder: Of the checkpoint.
      directory: Of the checkpoint, whose configs say which tokens end a text.
      records: Of validation, whose first ones are the prompts; as many as the config's samples, or all.

    Raises:
      UserError: The model cannot tell so many tokens apart.
    """

    def __init__(self, program: Program, encoder: Encoder, directory: Path, records: Records):
        config = program.config
        self._config, self._mesh, self._tokenizer = config, program.mesh, encoder.tokenizer
        self._ends = ends(directory)
        self.prompts = _prompts(encoder, records, config.samples, min(config.length, _LONGEST))
        # Nothing divides the few rows: weights alone are on the mesh.
        options = Options(scan=True, dtype=jnp.dtype(config.dtype))
        family, shape = program.family, program.shape
        self._model = nnx.eval_shape(lambda: family.build(shape, options, rngs=nnx.Rngs(0)))
        slots = self.prompts.tokens.shape[1] + config.new_tokens
        try:
            self._model.check_length(slots)
        except ValueError:
            raise UserError(
                f"--new-tokens {config.new_tokens}: with prompts they are {slots} tokens, {config.model} has "
                f"{self._model.longest} positions"
            ) from None
        apply, _ = lora.nnx.functional(self._model)
        self._step = generation.make_step(lora.adapt(apply))

    def write(self, base: Any, delta: Any) -> list[str]:
        """An answer to each prompt, of the likeliest tokens."""
        if not self.prompts.texts:
            return []
        count, length = self.prompts.tokens.shape
        with jax.default_device(jax.local_devices()[0]):
            cache = jax.tree.map(np.asarray, self._model.cache(count, length + self._config.new_tokens))
        found = generation.greedy(
            self._step,
            (base, delta),
            jnp.asarray(self.prompts.tokens),
            jnp.asarray(self.prompts.mask),
            cache=cache,
            new_tokens=self._config.new_tokens,
            eos=self._ends,
            pad=self._ends[0] if self._ends else 0,
        )
        rows = meshes.gather(found)
        ended = np.isin(rows, self._ends)
        kept = np.cumsum(ended, axis=1) == 0
        decode = self._tokenizer.decode
        return [decode(row[keep].tolist(), skip_special_tokens=True).strip() for row, keep in zip(rows, kept)]


def ends(directory: Path) -> tuple[int, ...]:
    """The tokens that end a text: as `generation_config.json` has them, else `config.json`."""
    found = None
    if (directory / _GENERATION).exists():
        found = checkpoint.read_config(directory, _GENERATION).get("eos_token_id")
    if found is None:
        found = checkpoint.read_config(directory).get("eos_token_id")
    numbers = () if found is None else tuple(found) if isinstance(found, list) else (found,)
    if not all(isinstance(number, int) and 0 <= number < 1 << 31 for number in numbers):
        raise UserError(f"{directory}: eos_token_id is {found!r}, expected a token's number or a list of them")
    return numbers


def _prompts(encoder: Encoder, records: Records, count: int, length: int) -> Prompts:
    encoded = [encoder.encode_prompt(records[i], records.location(i)) for i in range(min(count, len(records)))]
    rows = [ids[-length:] for ids, _ in encoded]  # of one that is too long, the end
    longest = max(map(len, rows), default=1)
    tokens, mask = np.zeros((len(rows), longest), np.int32), np.zeros((len(rows), longest), bool)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], mask[i, : len(ids)] = ids, True
    texts = [encoder.tokenizer.decode(ids.tolist(), skip_special_tokens=True).strip() for ids in rows]
    return Prompts(tokens, mask, texts, [answer for _, answer in encoded])
