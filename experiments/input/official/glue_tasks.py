"""The texts and labels of GLUE's nine tasks.

References:
  Wang et al., `GLUE <https://arxiv.org/abs/1804.07461>`_, 2018
"""

import math
from dataclasses import dataclass
from pathlib import Path

from experiments.errors import UserError
from experiments.input.official.layout import Example, head
from experiments.input.records import Completion


@dataclass(frozen=True)
class Task:
    """The columns of a task.

    Attributes:
      folder: The directory in the distribution.
      texts: The columns of the texts.
      label: The column of the label.
      names: The names of the labels, in the order of the Hub's numbers; none for a regression.
      numbered: Whether the files have numbers instead of names.
      hub_texts: The columns of the texts on the Hub, if they have other names there.
      without_header: The columns of `train.tsv` and `dev.tsv`, if these have no header.
    """

    folder: str
    texts: tuple[str, ...]
    label: str
    names: tuple[str, ...] = ()
    numbered: bool = False
    hub_texts: tuple[str, ...] = ()
    without_header: tuple[str, ...] = ()

    def index(self, text: str, where: str) -> int | float:
        """Returns a label as the index of its name; of a regression its value.

        Raises:
          UserError: It is no label of this task.
        """
        if not self.names:
            try:
                number = float(text)
            except ValueError:
                number = math.nan
            if math.isnan(number):
                raise UserError(f"{where}: {self.label} is {text!r}, expected a number")
            return number
        spellings = [str(i) for i in range(len(self.names))] if self.numbered else list(self.names)
        if text not in spellings:
            raise UserError(f"{where}: {self.label} is {text!r}, expected one of {', '.join(spellings)}")
        return spellings.index(text)

    def example(self, row: dict[str, str], where: str) -> Example:
        """Returns the texts with the names of their columns, and the name of the label as an answer."""
        if self.label not in row:
            raise UserError(f"{where}: the labels of GLUE's test examples are secret")
        index = self.index(row[self.label], where)
        answer = self.names[int(index)] if self.names else row[self.label]
        lines = [f"{name}: {row[column]}" for name, column in zip(self.hub_texts or self.texts, self.texts)]
        return Example(Completion("\n".join([*lines, "label:"]), f" {answer}"), index)

    def matches(self, path: Path) -> bool:
        """Whether a table has the columns and the labels of this task."""
        first, _, rest = head(path).partition("\n")
        fields, row = first.strip("\r").split("\t"), rest.partition("\n")[0].strip("\r").split("\t")
        if self.without_header:
            return len(fields) == len(self.without_header) and fields[1] in ("0", "1")
        if not {*self.texts, self.label} <= set(fields) or len(row) != len(fields):
            return False
        text = row[fields.index(self.label)]
        return not self.names or (text.isdigit() if self.numbered else text in self.names)


_ENTAILMENT = ("entailment", "not_entailment")
_SENTENCES = ("sentence1", "sentence2")
MNLI = Task(
    "MNLI",
    _SENTENCES,
    "gold_label",
    ("entailment", "neutral", "contradiction"),
    hub_texts=("premise", "hypothesis"),
)
TASKS = {
    "cola": Task(
        "CoLA",
        ("sentence",),
        "label",
        ("unacceptable", "acceptable"),
        numbered=True,
        without_header=("source", "label", "note", "sentence"),
    ),
    "sst2": Task("SST-2", ("sentence",), "label", ("negative", "positive"), True),
    "mrpc": Task("MRPC", ("#1 String", "#2 String"), "Quality", ("not_equivalent", "equivalent"), True, _SENTENCES),
    "stsb": Task("STS-B", _SENTENCES, "score"),
    "qqp": Task("QQP", ("question1", "question2"), "is_duplicate", ("not_duplicate", "duplicate"), True),
    "mnli": MNLI,
    "mnli-mismatched": MNLI,
    "qnli": Task("QNLI", ("question", "sentence"), "label", _ENTAILMENT),
    "rte": Task("RTE", _SENTENCES, "label", _ENTAILMENT),
    "wnli": Task("WNLI", _SENTENCES, "label", ("not_entailment", "entailment"), True),
}
