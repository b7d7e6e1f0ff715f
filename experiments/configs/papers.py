"""The original settings of papers, which `--paper NAME` sets in the comparisons of methods.

A preset sets the fields of a config that no flag sets, and hyperparameters of single rows. The values are those of the
papers' tables; where scripts or counts of the authors differ, a note of the preset says which value it has.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.errors import UserError


@dataclass(frozen=True)
class Preset:
    """The setting of a table of a paper.

    Attributes:
      source: The paper and the table.
      model: The model that it is for, as a sentence names it.
      tasks: The tasks of GLUE that it has.
      fields: Returns the values of a config's fields by name: `fields(task)`.
      rows: Returns fields of rows by pattern of their names, of which the first match counts: `rows(task)`. They
        replace the rates, epochs and batch size of the config, and the paper's value.
      heading: Returns the heading of the column of the paper's values: `heading(task)`; None is that of the study.
      model_type: The `model_type` of the model's `config.json`; None accepts every encoder.
      width: The width of the paper's model; None if it is another one than encoders have.
      notes: Sentences about the differences between the paper's runs and these.
    """

    source: str
    model: str
    tasks: tuple[str, ...]
    fields: Callable[[str], dict[str, Any]]
    rows: Callable[[str], Mapping[str, Mapping[str, Any]]] = lambda task: {}
    heading: Callable[[str], str] | None = None
    model_type: str | None = None
    width: int | None = None
    notes: tuple[str, ...] = ()

    def task(self, name: str, model: str, usual_model: str, data: str) -> str:
        """Returns the task of GLUE that `data` means.

        Args:
          name: The name of the preset.
          model: The value of `--model`.
          usual_model: Its default, which is no model of a paper.
          data: The value of `--data`.

        Raises:
          UserError: Model or data are not those of the preset.
        """
        from experiments.input.official import catalog  # imports NumPy, which the command line does without

        wanted = ", ".join(f"glue/{task}" for task in self.tasks)
        selection = catalog.find(data)
        task = selection.layout.name.removeprefix("glue/").partition("-")[0] if selection is not None else ""
        missing = []
        if model == usual_model:
            missing.append(f"--model with a directory or a name on the Hub, of {self.model}")
        if selection is None or not selection.layout.name.startswith("glue/"):
            example = f"glue/{self.tasks[0]}"
            missing.append(f"--data with one of GLUE's tasks ({example}:DIRECTORY, or {example} on the Hub)")
        if missing:
            raise UserError(f"--paper {name} needs {', and '.join(missing)}")
        if task not in self.tasks:
            raise UserError(f"--paper {name}: {self.source} has no setting for {data}; it has {wanted}")
        return task


def apply(config: Any, presets: Mapping[str, Preset], absent: str, fast: Mapping[str, Any]) -> None:
    """Sets the fields of a config to those of the paper that it names, unless they differ from their default.

    Args:
      config: A comparison's config whose `settled` is false; afterwards it is true.
      presets: The presets of its study by name.
      absent: Why the study has no presets, and what to run instead.
      fast: The values of `--fast`, which win over the paper's.

    Raises:
      UserError: There is no such preset, or model or data are not those of the paper.
    """
    if config.paper not in presets:
        near = difflib.get_close_matches(config.paper, presets, n=1)
        hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(presets)}"
        raise UserError(f"--paper {config.paper}: {hint if presets else absent}")
    preset, kind = presets[config.paper], type(config)
    task = preset.task(config.paper, config.model, kind.model, config.data)
    values = {"out": Path(f"{kind.out}-{config.paper}-{task}"), **preset.fields(task)}
    for name, value in {**values, **(fast if config.fast else {})}.items():
        if getattr(config, name) == getattr(kind, name):
            object.__setattr__(config, name, value)
    object.__setattr__(config, "settled", True)


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
    source: str, rows: Callable[[str], Mapping[str, Mapping[str, Any]]] = lambda task: {}, **fields: Any
) -> Preset:
    """Returns the setting of the LoRA paper's GPT-3 175B on MNLI (table 12), for another model.

    Args:
      source: The paper and the tables.
      rows: See :class:`Preset`.
      **fields: The values of a study's own fields, or others than those of table 12.
    """
    shared = {
        "epochs": 2,
        "batch_size": 128,
        "warmup": 0.008,
        "weight_decay": 0.1,
        "lengths": lengths(512),
    }
    return Preset(
        source,
        "any encoder, such as FacebookAI/roberta-large",
        ("mnli",),
        lambda task: {**ALL, **shared, **fields},
        rows,
        notes=(
            "The paper's model is GPT-3 175B, for which its learning rates were chosen.",
            "Texts have up to 512 tokens instead of 768, and the warmup of 250,000 tokens is 0.8 % of two passes over "
            "MNLI, of some 40 tokens an example.",
            "The paper does not state alpha.",
            *NOTES,
        ),
    )
