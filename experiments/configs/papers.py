"""The original settings of papers, which `--paper NAME` sets in the comparisons of methods.

A preset sets the fields of a config that no flag sets, also for single rows. The values are those of the
papers' tables; where scripts or counts of the authors differ, a note of the preset says which value it has.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.errors import UserError


@dataclass(frozen=True)
class Preset:
    """The setting of a table of a paper.

    Attributes:
      source: The paper and the table.
      tasks: The tasks of GLUE that it has.
      fields: Returns the values of a config's fields by name: `fields(task)`.
      rows: Returns what differs by row: `rows(task)`, by pattern of the rows' names, of which the first match counts.
        It has the values of a config's fields that a row has instead (a learning rate, `epochs`, `batch_size`), by
        name, unless a flag sets them; and under `paper`, the paper's result.
      heading: Returns the heading of the column of the paper's results: `heading(task)`; None is that of the study.
      model: The model that it is for, as a sentence names it.
      model_type: The `model_type` of the model's `config.json`; None accepts every encoder.
      width: The width of the paper's model; None if it is another one than encoders have.
      notes: Sentences about the differences between the paper's runs and these.
    """

    source: str
    tasks: tuple[str, ...]
    fields: Callable[[str], dict[str, Any]]
    rows: Callable[[str], Mapping[str, Mapping[str, Any]]] = lambda task: {}
    heading: Callable[[str], str] | None = None
    model: str = ""
    model_type: str | None = None
    width: int | None = None
    notes: tuple[str, ...] = ()

    def task(self, name: str, model: str, usual_model: str, data: str) -> str:
        """Returns the task of GLUE that `data` means.

        Args:
          name: The name of the preset.
          model: The value of `--model`.
          usual_model: Its default.
          data: The value of `--data`.

        Raises:
          UserError: Model or data are not those of the preset.
        """
        from experiments.input.official import catalog  # imports NumPy, which the command line does without

        selection = catalog.find(data)
        layout = "" if selection is None else selection.layout.name
        missing = []
        if self.model_type is not None and model == usual_model:
            missing.append(f"--model, {self.model}")
        if not layout.startswith("glue/"):
            example = f"glue/{self.tasks[0]}"
            missing.append(f"--data, one of GLUE's tasks: {example}:DIRECTORY, or {example} on the Hub")
        if missing:
            raise UserError(f"--paper {name} needs {'; and '.join(missing)}")
        task = layout.removeprefix("glue/").partition("-")[0]
        if task not in self.tasks:
            wanted = ", ".join(f"glue/{task}" for task in self.tasks)
            raise UserError(f"--paper {name}: {self.source} has no setting for {data}; it has {wanted}")
        return task


def lengths(longest: int) -> tuple[int, ...]:
    """Returns the lengths that texts are padded to.

    Example:
      >>> lengths(320)
      (32, 64, 128, 256, 320)
    """
    return (*(length for length in (32, 64, 128, 256) if length < longest), longest)


ALL = {"train_examples": None, "validation_examples": None, "test_examples": None, "label_smoothing": 0.0}
"""All examples, and the plain cross-entropy."""

NOTES = (
    "The head is a linear layer on the mean over tokens that starts converged; the authors train a new head on the "
    "first token, and drop out activations.",
    "Learning rates are selected on held-out training examples, and runs are evaluated at their end; the paper reports "
    "the best epoch on the development examples.",
)
"""What differs in all comparisons."""

GPT3_RATES = {"LoRA": 2e-4, "full": 5e-6, "BitFit": 1.6e-3, "PreEmbed": 5e-4, "PreLayer": 1e-4, "adapters": 1e-4}
"""Table 12 of the LoRA paper."""


def gpt3(
    source: str,
    rows: Callable[[str], Mapping[str, Mapping[str, Any]]] = lambda task: {},
    heading: str | None = "paper: GPT-3 175B, MNLI",
    notes: Sequence[str] = (),
    **fields: Any,
) -> Preset:
    """Returns the setting of the LoRA paper's GPT-3 175B on MNLI (table 12), for another model.

    Args:
      source: The paper and the tables.
      rows: See :class:`Preset`.
      heading: The heading of the column of the paper's results; None is that of the study.
      notes: What differs from the paper in the study alone.
      **fields: The values of a study's own fields, or others than those of table 12.
    """
    shared = {
        "alpha": 8.0,
        "epochs": 2,
        "batch_size": 128,
        "warmup": 0.008,
        "weight_decay": 0.1,
        "lengths": lengths(512),
    }
    return Preset(
        source,
        ("mnli",),
        lambda task: {**ALL, **shared, **fields},
        rows,
        heading=None if heading is None else lambda task: heading,
        notes=(
            "The paper's model is GPT-3 175B, for which its learning rates were chosen.",
            "Texts have up to 512 tokens instead of 768. The warmup is 0.8 % of the steps: the paper's 250,000 tokens "
            "are that share of two passes over MNLI, of some 40 tokens an example.",
            "The paper does not state alpha for GPT-3. It sets alpha to the first rank that it tries and does not "
            "change it with the rank, so alpha is 8, the rank of table 17.",
            *notes,
            *NOTES,
        ),
    )
