"""Text from a decoder: greedy, sampled, or the best of several beams.

All take `step(params, tokens_BL, mask_BL, cache) -> (logits_BV, cache)`, which gives the logits of the last place.
The parameters are one argument, whatever they are: a base, a base with its delta, a quantized base.
"""

from experiments.generation.beams import Beams, beam_search
from experiments.generation.loop import Step, greedy, sample, stepper
from experiments.generation.ngrams import forbid_repeats
from experiments.generation.sampling import filtered

__all__ = ["Beams", "Step", "beam_search", "filtered", "forbid_repeats", "greedy", "sample", "stepper"]
