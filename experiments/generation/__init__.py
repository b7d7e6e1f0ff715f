"""Text generation with a decoder: greedy, sampling, and beam search.

All functions take `step(params, tokens_BL, mask_BL, cache) -> (logits_BV, cache)`, which computes the logits of the
last position. The parameters are one argument of any type: a base, a base with its delta, or a quantized base.
"""

from experiments.generation.beams import Beams, beam_search
from experiments.generation.detokenizer import Detokenizer
from experiments.generation.loop import Step, greedy, make_step, sample
from experiments.generation.ngrams import forbid_repeats
from experiments.generation.prefixes import prefill
from experiments.generation.sampling import filter_logits
from experiments.generation.session import Session

__all__ = [
    "Beams",
    "Detokenizer",
    "Session",
    "Step",
    "beam_search",
    "filter_logits",
    "forbid_repeats",
    "greedy",
    "make_step",
    "prefill",
    "sample",
]
