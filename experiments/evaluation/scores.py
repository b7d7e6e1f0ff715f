"""Scores of generated answers: perplexity of the reference answers, ROUGE-L and BLEU.

References:
  Lin, `ROUGE: A Package for Automatic Evaluation of Summaries <https://aclanthology.org/W04-1013/>`_, 2004, §3
  Post, `A Call for Clarity in Reporting BLEU Scores <https://arxiv.org/abs/1804.08771>`_, 2018
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import sacrebleu
from rich import box
from rich.table import Table
from rouge_score.rouge_scorer import RougeScorer

from experiments.evaluation.answers import Answer

_ROUGE = "rougeL"


@dataclass(frozen=True)
class Scores:
    """Scores of a model's answers.

    Attributes:
      name: The name of the model in tables.
      examples: The number of answers.
      perplexity: Perplexity per token of the reference answers.
      rouge_l: Mean F-measure of ROUGE-L, from 0 to 100.
      rouge_l_error: Its standard error over the examples.
      bleu: Corpus BLEU, from 0 to 100.
    """

    name: str
    examples: int
    perplexity: float
    rouge_l: float
    rouge_l_error: float
    bleu: float


def score(name: str, answers: Sequence[Answer], references: Sequence[str]) -> Scores:
    """Compares answers with reference answers.

    Args:
      name: The name of the model.
      answers: At least one.
      references: The reference answers as text.
    """
    texts = [answer.text for answer in answers]
    scorer = RougeScorer([_ROUGE])
    rouge = [100 * scorer.score(reference, text)[_ROUGE].fmeasure for text, reference in zip(texts, references)]
    mean_loss = sum(answer.loss for answer in answers) / sum(answer.tokens for answer in answers)
    return Scores(
        name,
        len(answers),
        math.exp(min(mean_loss, 700)),  # a float's largest power
        float(np.mean(rouge)),
        float(np.std(rouge, ddof=1) / math.sqrt(len(rouge))) if len(rouge) > 1 else 0.0,
        sacrebleu.corpus_bleu(texts, [list(references)]).score,
    )


def table(scores: Sequence[Scores]) -> Table:
    """Returns the scores with a line for each model."""
    rows = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    rows.add_column("")
    for name in ("perplexity", "ROUGE-L", "BLEU"):
        rows.add_column(name, justify="right", no_wrap=True)
    for row in scores:
        rows.add_row(row.name, *cells(row))
    return rows


def cells(row: Scores) -> tuple[str, str, str]:
    """Returns perplexity, ROUGE-L with its standard error, and BLEU as text."""
    perplexity = f"{row.perplexity:.1f}" if row.perplexity < 1e5 else f"{row.perplexity:.1e}"
    return perplexity, f"{row.rouge_l:.1f} ± {row.rouge_l_error:.1f}", f"{row.bleu:.1f}"
