"""What distinguishes one study of post-training from another."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

import lora_jax as lora
from experiments.studies.decoder.program import Objective, Program
from experiments.studies.post_training.data import Data

Values = dict[str, np.ndarray]
"""The values of a measure by its name, one for each held-out record."""


@dataclass(frozen=True)
class Measured:
    """What is measured on the held-out records.

    Attributes:
      values: Values by measure.
      texts: Prompts with an answer of the model, as samples.
    """

    values: Values
    texts: list[tuple[str, str]] = field(default_factory=list)


Measure = Callable[[Any, Any], Measured]
"""`measure(base, delta)`. Every process calls it."""

Step = Callable[[lora.TrainState, Mapping[str, Any]], tuple[lora.TrainState, dict[str, Any]]]


@dataclass(frozen=True)
class Aim:
    """A number that a study aims at.

    Attributes:
      measure: The measure.
      change: The smallest change from the base; None is twice its standard error.
    """

    measure: str
    change: float | None


@dataclass(frozen=True)
class Task:
    """A study of post-training. Its functions take the study's config first.

    Attributes:
      name: Its name.
      objective: Returns what is trained.
      measure: Returns the function that measures a delta.
      aim: What the study aims at. Its measure is the score of evaluations.
      curve: The mean of the objective that the figure and the progress show over steps.
      step: Returns the step of the training loop.
      task_type: The type of the task in PEFT's config.
      compare: Returns the values of base and adapter that are compared, of the measured values of both.
      new_tokens: The number of tokens of an answer that follows each row of the data.
    """

    name: str
    objective: Callable[[Any, Data], Objective]
    measure: Callable[[Any, Program, Data], Measure]
    aim: Aim
    curve: str
    step: Callable[[Any, Program, Data], Step] = lambda config, program, data: program.step
    task_type: str = "CAUSAL_LM"
    compare: Callable[[Any, Values, Values], tuple[Values, Values]] = lambda config, before, after: (before, after)
    new_tokens: Callable[[Any], int] = lambda config: 0
