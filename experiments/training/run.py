"""The description of a training run: its settings, its limits and what it has measured."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh


@dataclass
class History:
    """The measurements of a run so far.

    Attributes:
      losses: The loss of each step.
      evaluations: Pairs of a step and its validation score, which the study defines.
      seconds: The time of training and evaluation, including compilation.
      means: The means of other metrics of each step, by name.
    """

    losses: list[float] = field(default_factory=list)
    evaluations: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0
    means: dict[str, list[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.evaluations = [(step, score) for step, score in self.evaluations]  # JSON stores pairs as lists

    def recent(self, shown: str | None = None) -> str:
        """Returns the means of the last 20 losses, and of one of `means`.

        Example:
          >>> History(losses=[0.5, 0.25], means={"reward": [0.0, 1.0]}).recent("reward")
          'loss 0.375, reward 0.500'
        """
        values = {"loss": self.losses} | ({} if shown is None else {shown: self.means.get(shown, [])})
        return ", ".join(f"{name} {np.mean(last[-20:] or [math.nan]):.3f}" for name, last in values.items())


@dataclass(frozen=True)
class Limits:
    """Conditions that end a run before its last step.

    Attributes:
      minutes: The maximum time of training and evaluation, including earlier processes of the run; None has no limit.
      patience: The number of consecutive evaluations without a better score; None has no limit.
      best: Whether higher ("max") or lower ("min") scores are better.
    """

    minutes: float | None = None
    patience: int | None = None
    best: Literal["max", "min"] = "max"

    def reached(self, history: History) -> str | None:
        """Describes the limit that a run has reached; None if it continues.

        Example:
          >>> Limits(patience=2, best="min").reached(History(evaluations=[(0, 3.0), (5, 2.0), (10, 2.5), (15, 2.1)]))
          'no better validation score in 2 evaluations'
        """
        if self.minutes is not None and history.seconds >= 60 * self.minutes:
            return f"{self.minutes:g} minutes are over"
        if self.patience is not None and history.evaluations:
            scores = [score for _, score in history.evaluations]
            better = (max if self.best == "max" else min)(scores)
            if len(scores) - 1 - scores.index(better) >= self.patience:
                return f"no better validation score in {self.patience} evaluations"
        return None


@dataclass(frozen=True)
class Costs:
    """The costs from which the model FLOP utilization (MFU) of a run is computed.

    Attributes:
      token_flops: The model's floating-point operations per token, forward and backward, without the head's.
      label_flops: The head's per token with a label.
      peak: The peak FLOP/s of all devices of the run; None if unknown.
    """

    token_flops: float
    label_flops: float
    peak: float | None


@dataclass(frozen=True)
class TrainingRun:
    """The settings of a training run.

    Attributes:
      directory: The directory of the run's checkpoints and metrics.
      mesh: The mesh that shards batches.
      config: The resolved settings, which are recorded.
      checkpoint_every: The number of steps between checkpoints.
      best: Whether higher ("max") or lower ("min") scores are better.
      settings: See :class:`experiments.training.checkpoints.Checkpoints`.
      profile: The steps to profile.
      costs: None does not compute the model FLOP utilization.
      limits: Conditions that end the run before its last step.
      log_every: The number of steps between lines of metrics.
      shown: The mean of :attr:`History.means` that the progress shows beside the loss; None shows none.
    """

    directory: Path
    mesh: Mesh
    config: Mapping[str, Any]
    checkpoint_every: int
    best: Literal["max", "min"] = "max"
    settings: Mapping[str, Any] = field(default_factory=dict)
    profile: range = range(0)
    costs: Costs | None = None
    limits: Limits = field(default_factory=Limits)
    log_every: int = 1
    shown: str | None = None

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"
