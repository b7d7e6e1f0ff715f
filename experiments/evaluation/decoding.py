"""How answers are generated."""

from dataclasses import dataclass

from experiments import settings


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A base class of configs that score generated answers."""

    beams: int = 1
    """Number of beams of the search for scored answers, with the rules of Hugging Face's generate. 1 is greedy."""

    length_penalty: float = 1.0
    """Beam search divides the log-probability of an answer by its number of tokens to this power."""

    no_repeat_ngram: int = 0
    """The size n of n-grams that may not occur twice in a scored answer; those of its prompt may occur in it. 0 allows
    all."""

    def __post_init__(self) -> None:
        settings.positive(self, "beams")
        settings.not_negative(self, "no_repeat_ngram")

    def decoding(self) -> "Decoding":
        """Returns these settings alone."""
        return Decoding(beams=self.beams, length_penalty=self.length_penalty, no_repeat_ngram=self.no_repeat_ngram)


GREEDY = Decoding()
