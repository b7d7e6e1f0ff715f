"""Beam search with the rules of Hugging Face's `generate`.

Shape suffixes: B prompts, K beams, C candidates for the next beams, T positions of a text, V vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from experiments.generation import prompts
from experiments.generation.loop import Step
from experiments.generation.ngrams import forbid_repeats
from experiments.models.cache import Cache

_NEVER = -1e9  # a score below that of any text; finite, so that adding to it is safe
EarlyStopping = bool | Literal["never"]


class Beams(NamedTuple):
    """The best continuations of each prompt, in descending order of their scores.

    Attributes:
      tokens_BKN: The new tokens, `int[batch, beams, new_tokens]`.
      scores_BK: The log-probability of each, divided by its length to the power of the length penalty.
    """

    tokens_BKN: jax.Array
    scores_BK: jax.Array


class _State(NamedTuple):
    texts_BKT: jax.Array  # of the running beams
    scores_BK: jax.Array  # their log-probabilities
    ended_BKT: jax.Array  # the best ended texts
    ended_scores_BK: jax.Array  # including the length penalty
    has_ended_BK: jax.Array
    hopeful_B: jax.Array  # whether a running beam may still become better than an ended text
    stuck: jax.Array  # whether all candidates have ended
    parents_BK: jax.Array  # the previous beams that the running beams extend
    cache: Cache
    count: jax.Array  # new tokens so far


def beam_search(
    step: Step,
    params: Any,
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None = None,
    *,
    cache: Cache,
    new_tokens: int,
    beams: int,
    length_penalty: float = 1.0,
    early_stopping: EarlyStopping = False,
    eos: int | Sequence[int] | None = None,
    pad: int = 0,
    no_repeat: int = 0,
    prompt_repeats: bool = False,
) -> Beams:
    """Continues each prompt with the texts of the highest scores, by beam search.

    Args:
      step: Computes the next logits; see :func:`experiments.generation.stepper`.
      params: The first argument of `step`.
      tokens_BL: Prompts, padded on either side; with a used cache, what follows the tokens in it, at least one per row.
      mask_BL: True at tokens, False at padding. None: no padding.
      cache: A cache with the same number of rows and free slots for prompts and new tokens: an empty one, or one that
        holds the beginning of each row; see :func:`experiments.generation.prefill`.
      new_tokens: Maximum number of tokens to add.
      beams: Number of texts per prompt.
      length_penalty: Log-probabilities are divided by the number of new tokens to this power. Values above 0 favor
        long texts, below 0 short texts.
      early_stopping: When to finish a prompt that has as many ended texts as beams. True: immediately. False: when the
        best running beam, scored at its current length, is worse than all of them. 'never': when it cannot become
        better at any length.
      eos: The token or tokens that end a text.
      pad: The token after the end of a text.
      no_repeat: The size n of n-grams that may not occur twice in a prompt and its continuation; 0 allows all. Others
        need an empty cache, unless `prompt_repeats`.
      prompt_repeats: Whether n-grams of the prompt may occur again, so that only those of the continuation may not.

    Raises:
      ValueError: The cache does not fit, or the vocabulary is smaller than the number of candidates.
    """
    prompts.check(tokens_BL, new_tokens, cache, 0 if prompt_repeats else no_repeat)
    if beams < 1:
        raise ValueError(f"beams={beams}, expected at least 1.")
    if early_stopping not in (True, False, "never"):
        raise ValueError(f"early_stopping={early_stopping!r}, expected True, False or 'never'.")
    return _search(
        step,
        params,
        tokens_BL,
        mask_BL,
        cache,
        float(length_penalty),
        new_tokens,
        beams,
        early_stopping,
        prompts.ends(eos),
        pad,
        no_repeat,
        prompt_repeats,
    )


@functools.partial(
    jax.jit,
    static_argnames=(
        *("step", "length_penalty", "new_tokens", "beams", "early_stopping", "eos", "pad", "no_repeat"),
        "prompt_repeats",
    ),
)
def _search(
    step: Step,
    params: Any,
    tokens_BL: jax.Array,
    mask_BL: jax.Array | None,
    cache: Cache,
    length_penalty: float,
    new_tokens: int,
    beams: int,
    early_stopping: EarlyStopping,
    eos: tuple[int, ...],
    pad: int,
    no_repeat: int,
    prompt_repeats: bool,
) -> Beams:
    tokens_BL, mask_BL = prompts.align(tokens_BL, mask_BL)
    batch, length = tokens_BL.shape
    begins_B = jnp.full(batch, length) if prompt_repeats else jnp.argmax(mask_BL, axis=1)
    begins_Z = jnp.repeat(begins_B, beams)  # Z is B times K
    # This is enough for all beams to continue, even if every end token is among the best candidates.
    candidates = max(2, 1 + len(eos)) * beams

    def penalized(scores: jax.Array, count: jax.Array | int) -> jax.Array:
        return scores / jnp.asarray(count, jnp.float32) ** length_penalty

    def advance(state: _State, logits_ZV: jax.Array) -> _State:
        count, position = state.count, length + state.count
        logp_ZV = jax.nn.log_softmax(logits_ZV.astype(jnp.float32), axis=-1)
        texts_ZT = state.texts_BKT.reshape(batch * beams, -1)
        logp_ZV = forbid_repeats(logp_ZV, texts_ZT, begins_Z, position, no_repeat)
        vocabulary = logp_ZV.shape[-1]
        scores_BKV = logp_ZV.reshape(batch, beams, vocabulary) + state.scores_BK[..., None]
        scores_BC, choice_BC = jax.lax.top_k(scores_BKV.reshape(batch, -1), candidates)
        parents_BC, next_BC = choice_BC // vocabulary, choice_BC % vocabulary
        texts_BCT = _pick(state.texts_BKT, parents_BC)
        texts_BCT = jax.lax.dynamic_update_slice_in_dim(
            texts_BCT, next_BC[..., None].astype(texts_BCT.dtype), position, axis=2
        )
        ends_BC = prompts.is_end(next_BC, eos) | (count + 1 >= new_tokens)

        running_BC = jnp.where(ends_BC, scores_BC + _NEVER, scores_BC)
        scores_BK, best_BK = jax.lax.top_k(running_BC, beams)

        # An end counts only among the best `beams` candidates, and only if the prompt can still improve.
        counts_BC = ends_BC & (jnp.arange(candidates) < beams)[None]
        full_B1 = jnp.all(state.has_ended_BK, axis=1, keepdims=True) & (early_stopping is True)
        final_BC = penalized(scores_BC, count + 1)
        for barred in (full_B1, ~state.hopeful_B[:, None], ~counts_BC):
            final_BC = final_BC + jnp.where(barred, _NEVER, 0.0)
        merged_scores = jnp.concatenate([state.ended_scores_BK, final_BC], axis=1)
        ended_scores_BK, index_BK = jax.lax.top_k(merged_scores, beams)
        ended_BKT = _pick(jnp.concatenate([state.ended_BKT, texts_BCT], axis=1), index_BK)
        has_ended_BK = _pick(jnp.concatenate([state.has_ended_BK, counts_BC], axis=1), index_BK)

        # Compare the best score that the first beam can reach with the worst ended text.
        longest = new_tokens if early_stopping == "never" and length_penalty > 0 else count + 1
        hope_B = penalized(scores_BK[:, 0], longest)
        worst_BK = jnp.where(has_ended_BK, jnp.min(ended_scores_BK, axis=1, keepdims=True), _NEVER)
        hopeful_B = state.hopeful_B & jnp.any(hope_B[:, None] > worst_BK, axis=1)
        return _State(
            _pick(texts_BCT, best_BK),
            scores_BK,
            ended_BKT,
            ended_scores_BK,
            has_ended_BK,
            hopeful_B,
            jnp.all(ends_BC),
            _pick(parents_BC, best_BK),
            state.cache,
            count + 1,
        )

    def should_continue(state: _State) -> jax.Array:
        done = jnp.all(state.has_ended_BK) & (early_stopping is True)
        return jnp.any(state.hopeful_B) & ~done & ~state.stuck

    def extend(state: _State) -> _State:
        rows_Z = (state.parents_BK + jnp.arange(batch)[:, None] * beams).reshape(-1)
        last_BK1 = jax.lax.dynamic_slice_in_dim(state.texts_BKT, length + state.count - 1, 1, axis=2)
        last_Z1 = last_BK1.reshape(-1, 1)
        logits_ZV, cache = step(params, last_Z1, jnp.ones(last_Z1.shape, bool), state.cache.select(rows_Z))
        return advance(state._replace(cache=cache), logits_ZV)

    logits_BV, cache = step(params, tokens_BL, mask_BL, cache)
    if candidates > logits_BV.shape[-1]:
        raise ValueError(
            f"{beams} beams with {len(eos)} end tokens need {candidates} tokens, got {logits_BV.shape[-1]}."
        )
    texts_BT = jnp.pad(tokens_BL, ((0, 0), (0, new_tokens)), constant_values=pad)
    texts_BKT = jnp.repeat(texts_BT[:, None], beams, axis=1)
    shape_BK = (batch, beams)
    start = _State(
        texts_BKT,
        # All beams are initially equal: only one counts.
        jnp.broadcast_to(jnp.where(jnp.arange(beams) == 0, 0.0, _NEVER)[None], shape_BK),
        texts_BKT,
        jnp.full(shape_BK, _NEVER),
        jnp.zeros(shape_BK, bool),
        jnp.ones(batch, bool),
        jnp.zeros((), bool),
        jnp.zeros(shape_BK, jnp.int32),
        cache.select(jnp.repeat(jnp.arange(batch), beams)),
        jnp.zeros((), jnp.int32),
    )
    state = advance(start, jnp.repeat(logits_BV, beams, axis=0))
    state = jax.lax.while_loop(should_continue, extend, state)
    return Beams(state.ended_BKT[:, :, length:], state.ended_scores_BK)


def _pick(x_BN: jax.Array, index_BM: jax.Array) -> jax.Array:
    """Selects entries along the second axis, with separate indices for each row."""
    index = index_BM.reshape(*index_BM.shape, *(1,) * (x_BN.ndim - 2))
    return jnp.take_along_axis(x_BN, index, axis=1)
