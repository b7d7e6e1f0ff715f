"""Metrics of generated texts with several references, from 0 to 100; NIST is not bounded.

BLEU, chrF and TER are sacrebleu's, ROUGE is rouge-score's, NIST and METEOR are nltk's. CIDEr is absent: no maintained
package without Java computes it. What differs from the scripts of the E2E challenge:

- BLEU is that of mteval-v13a, as there, if it ignores case. An order of n-grams without any match is smoothed.
- NIST compares with the best reference for each order of n-grams, there with all of them together, which gives higher
  values. With one reference they are equal.
- METEOR is the definition of 2007 with WordNet's synonyms, there version 1.5 with paraphrases, whose values are lower.
  nltk looks up a word that differs from its stem under the stem, and so misses most of its synonyms.
- ROUGE-L is the F1 of the best reference, there an F with β = 1.2 of the best precision and the best recall.

References:
  Papineni et al., `BLEU <https://aclanthology.org/P02-1040/>`_, 2002
  Doddington, `Automatic Evaluation of Machine Translation Quality Using N-gram Co-occurrence Statistics
  <https://dl.acm.org/doi/10.5555/1289189.1289273>`_, 2002
  Lin, `ROUGE <https://aclanthology.org/W04-1013/>`_, 2004
  Snover et al., `A Study of Translation Edit Rate <https://aclanthology.org/2006.amta-papers.25/>`_, 2006
  Lavie and Agarwal, `METEOR <https://aclanthology.org/W07-0734/>`_, 2007
  Popović, `chrF <https://aclanthology.org/W15-3049/>`_, 2015
  Post, `A Call for Clarity in Reporting BLEU Scores <https://arxiv.org/abs/1804.08771>`_, 2018
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import sacrebleu
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from experiments.evaluation import wordnet

References = Sequence[Sequence[str]]
"""For each text one or several references."""

_ORDERS = 5  # of NIST's n-grams


def bleu(texts: Sequence[str], references: References, *, lowercase: bool = False) -> float:
    """Returns corpus BLEU."""
    return sacrebleu.corpus_bleu(list(texts), _streams(references), lowercase=lowercase).score


def chrf(texts: Sequence[str], references: References) -> float:
    """Returns corpus chrF2."""
    return sacrebleu.corpus_chrf(list(texts), _streams(references)).score


def ter(texts: Sequence[str], references: References) -> float:
    """Returns corpus TER, an error: lower is better."""
    return sacrebleu.corpus_ter(list(texts), _streams(references)).score


def rouge(
    texts: Sequence[str], references: References, kinds: Sequence[str], *, stemmer: bool = False
) -> dict[str, float]:
    """Returns the mean F1 of kinds of ROUGE (`rouge1`, `rouge2`, `rougeL`), with the best reference of each text."""
    scorer = RougeScorer(list(kinds), use_stemmer=stemmer)
    scores = [scorer.score_multi(list(several), text) for text, several in zip(texts, references, strict=True)]
    return {kind: 100 * float(np.mean([score[kind].fmeasure for score in scores])) for kind in kinds}


def nist(texts: Sequence[str], references: References) -> float:
    """Returns corpus NIST, without regard to case."""
    from nltk.translate.nist_score import corpus_nist  # takes a second

    tokens = [[_tokenize(text) for text in several] for several in references]
    answers = [_tokenize(text) for text in texts]
    longest = max(map(len, answers), default=0)  # nltk divides by the number of n-grams of each order
    return float(corpus_nist(tokens, answers, min(_ORDERS, longest))) if longest else 0.0


def meteor(texts: Sequence[str], references: References) -> float:
    """Returns the mean METEOR, with the best reference of each text.

    Raises:
      UserError: WordNet is not installed.
    """
    from nltk.translate.meteor_score import meteor_score

    reader = wordnet.open_reader()
    pairs = zip(texts, references, strict=True)
    scores = [
        meteor_score([_tokenize(ref) for ref in several], _tokenize(text), wordnet=reader) for text, several in pairs
    ]
    return 100 * float(np.mean(scores))


def _tokenize(text: str) -> list[str]:
    return Tokenizer13a()(text.lower()).split()


def _streams(references: References) -> list[list[Any]]:
    """Returns the first references of all texts, the second ones, and so on; None where a text has fewer."""
    count = max(map(len, references))
    return [[several[i] if i < len(several) else None for several in references] for i in range(count)]
