"""Generates answers to many prompts, and computes the losses of their reference answers.

The beginning that all prompts have in common is computed once. Prompts are sorted by length and read in pieces of one
size, and all batches of a call have the same shapes, so that little is padding and little is compiled. The losses and
the generated answer of a prompt continue the same keys and values.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import lora_jax as lora
from experiments import generation
from experiments.evaluation.decoding import GREEDY, Decoding
from experiments.evaluation.questions import Question
from experiments.models.cache import Cache
from experiments.models.decoder import Decoder
from experiments.training import mesh as meshes

_ROWS = 64  # prompts per batch, at most
_TOKENS = 16384  # slots of the cache of a batch, at most, if that is more than one prompt
_PIECE = 32  # tokens of each prompt that are read at a time
_ANSWER = 8  # the lengths of reference answers are multiples of it


@dataclass(frozen=True)
class Answer:
    """A generated answer and the loss of the reference answer.

    Attributes:
      text: The generated answer.
      loss: The sum of the losses of the reference answer's tokens.
      tokens: The number of these tokens.
    """

    text: str
    loss: float
    tokens: int


class Answerer:
    """Answers questions with any parameters of a model.

    Args:
      model: The decoder; its weights are not used.
      decode: Returns the text of tokens.
      ends: The tokens that end an answer.
    """

    def __init__(self, model: Decoder, decode: Callable[[list[int]], str], ends: Sequence[int]):
        self._model, self._decode, self._ends = model, decode, tuple(ends)
        adapted = lora.adapt(lora.nnx.functional(model)[0])
        self._step = generation.make_step(adapted)
        self._losses = jax.jit(functools.partial(_losses, adapted))

    def fits(self, question: Question, new_tokens: int) -> bool:
        """Whether the model supports the length of a question with its answer."""
        limits = [limit for limit in (self._model.longest, self._model.trained_length) if limit is not None]
        return len(question.prompt) + max(len(question.answer), new_tokens) <= min(limits, default=1 << 31)

    def answer(
        self,
        params: tuple[Any, Any],
        questions: Sequence[Question],
        new_tokens: int,
        report: Callable[[int], None] = lambda count: None,
        decoding: Decoding = GREEDY,
    ) -> list[Answer]:
        """Answers each question by greedy decoding or beam search.

        Args:
          params: Base and delta.
          questions: The questions; see :meth:`fits`.
          new_tokens: Maximum number of tokens per answer.
          report: Called with the number of answers of each finished batch.
          decoding: How answers are generated.
        """
        if not questions:
            return []
        layout = _Layout.of(questions, new_tokens, decoding.beams)
        begin = self._begin(params, questions[0].prompt[: layout.shared], layout)
        answers: dict[int, Answer] = {}
        order = sorted(range(len(questions)), key=lambda number: len(questions[number].prompt))
        for first in range(0, len(order), layout.rows):
            numbers = order[first : first + layout.rows]
            batch = [questions[number] for number in numbers]
            batch += batch[-1:] * (layout.rows - len(batch))  # the same shapes for all batches
            results = self._batch(params, batch, begin, layout, new_tokens, decoding)
            answers.update(zip(numbers, results))
            report(len(numbers))
        return [answers[number] for number in range(len(questions))]

    def _begin(self, params: tuple[Any, Any], tokens: np.ndarray, layout: "_Layout") -> Cache:
        """Returns the cache of a batch after the tokens with which all prompts begin."""
        # Arrays of the host, so that they can be used with parameters on any mesh.
        with jax.default_device(jax.local_devices()[0]):
            cache = jax.tree.map(np.asarray, self._model.cache(1, layout.slots).truncate(0))
        if not len(tokens):
            return jax.tree.map(jnp.asarray, cache).select(jnp.zeros(layout.rows, jnp.int32))
        return generation.prefill(self._step, params, jnp.asarray(tokens[None]), cache=cache, copies=layout.rows)

    def _batch(
        self,
        params: tuple[Any, Any],
        batch: list[Question],
        cache: Cache,
        layout: "_Layout",
        new_tokens: int,
        decoding: Decoding,
    ) -> list[Answer]:
        prompts = [question.prompt[layout.shared :] for question in batch]
        rest, mask = _pad([prompt[:-1] for prompt in prompts], _PIECE, left=True)
        for start in range(0, rest.shape[1], _PIECE):
            piece = slice(start, start + _PIECE)
            cache = generation.prefill(
                self._step, params, jnp.asarray(rest[:, piece]), jnp.asarray(mask[:, piece]), cache=cache
            )
        last = np.array([prompt[-1:] for prompt in prompts])
        labels, is_label = _pad([question.answer for question in batch], layout.answer)
        inputs = np.concatenate([last, labels[:, :-1]], axis=1)
        losses = self._losses(*params, inputs, is_label, np.where(is_label, labels, -1), cache)
        options: dict[str, Any] = {
            "cache": cache,
            "new_tokens": new_tokens,
            "eos": self._ends,
            "pad": self._ends[0] if self._ends else 0,
            "no_repeat": decoding.no_repeat_ngram,
            "prompt_repeats": True,
        }
        if decoding.beams == 1:
            tokens = generation.greedy(self._step, params, jnp.asarray(last), **options)
        else:
            options |= {"beams": decoding.beams, "length_penalty": decoding.length_penalty}
            tokens = generation.beam_search(self._step, params, jnp.asarray(last), **options).tokens_BKN[:, 0]
        rows, sums = meshes.gather(tokens), meshes.gather(losses)
        before_end = np.cumsum(np.isin(rows, self._ends), axis=1) == 0
        texts = [self._decode(row[keep].tolist()).strip() for row, keep in zip(rows, before_end)]
        return [Answer(text, float(loss), len(question.answer)) for text, loss, question in zip(texts, sums, batch)]


@dataclass(frozen=True)
class _Layout:
    """The shapes of all batches: the prompts' common beginning, rows, slots of the cache, and reference tokens."""

    shared: int
    rows: int
    slots: int
    answer: int

    @classmethod
    def of(cls, questions: Sequence[Question], new_tokens: int, beams: int) -> "_Layout":
        prompts = [question.prompt for question in questions]
        # Each prompt keeps at least one token, whose logits give the first token of the answer.
        shared = min(min(map(len, prompts)) - 1, _count_shared(prompts))
        rest = _round_up(max(map(len, prompts)) - shared - 1, _PIECE)
        answer = _round_up(max(len(question.answer) for question in questions), _ANSWER)
        slots = shared + rest + max(answer, new_tokens)
        batches = -(-len(prompts) // min(_ROWS, max(1, _TOKENS // (slots * beams))))
        return cls(shared, -(-len(prompts) // batches), slots, answer)


def _count_shared(rows: Sequence[np.ndarray]) -> int:
    """Returns the number of tokens with which all rows begin."""
    length = min(map(len, rows))
    differs = np.any(np.stack([row[:length] for row in rows]) != rows[0][:length], axis=0)
    return int(np.argmax(differs)) if differs.any() else length


def _losses(
    adapted: Callable, base: Any, delta: Any, tokens_BL: Any, mask_BL: Any, labels_BL: Any, cache: Cache
) -> jax.Array:
    losses_BL, _ = adapted(base, delta, tokens_BL, mask_BL, labels_BL=labels_BL, cache=cache)
    return jnp.sum(losses_BL, axis=1)


def _pad(rows: Sequence[np.ndarray], multiple: int, *, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Returns rows as `int32[rows, length]` with a mask; the length is a multiple of `multiple`."""
    length = _round_up(max(map(len, rows)), multiple)
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        where = slice(length - len(row), None) if left else slice(len(row))
        tokens[i, where], mask[i, where] = row, True
    return tokens, mask


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
