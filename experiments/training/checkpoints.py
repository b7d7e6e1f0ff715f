"""Checkpoints of a training run: what moves, a JSON beside it, and of the base a fingerprint only."""

import dataclasses
import json
import math
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import checkpoint_managers as managers

from experiments.errors import UserError
from experiments.training import checksum, processes
from lora_jax.io import is_read_error, open_arrays, printable, read_arrays, silence_logs

S = TypeVar("S")
SCORE = "score"
_NONE, _UNFIT = -1, -2  # in place of a step
_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone")


class Checkpoints:
    """Saves training states by step and restores the last one that is whole, on any mesh and number of processes.

    The last two are kept, and the one with the best score. A state's arrays are stored in the order of its leaves, the
    base left out; structure and everything static come from the state that the same settings build anew. A checkpoint
    appears whole, whenever the process ends; one whose files are damaged later is told by checksums, and passed over.
    A context manager: leaving it waits for what is being written. Every process makes the same calls.

    Args:
      directory: Made where it does not exist; one that all processes see.
      best: Which scores are better.
      settings: What decides the numbers of a run, as JSON can hold it: a checkpoint of others is refused.
      say: Called with a line on what is passed over.
    """

    def __init__(
        self,
        directory: Path,
        *,
        best: Literal["max", "min"] = "max",
        settings: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        self._directory, self._say = directory.absolute(), say
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings or {})))  # tuples as lists
        self._better = max if best == "max" else min
        self._worst = -math.inf if best == "max" else math.inf  # in place of a score, where a step has none
        self._fingerprint = ""
        kept = [managers.LatestN(2), managers.BestN(get_metric_fn=_score, reverse=best == "min", n=1)]
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,  # without it scores are not written
            preservation_policy=managers.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=True,
        )
        with self._telling("be opened"):
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            with self._telling("be written"):
                self._manager.close()
            return
        try:
            self._manager.close()
        except Exception as other:  # what is raised already says what went wrong first
            self._say(f"{self._directory}: the last checkpoint may be missing ({self._reason(other)})")

    def save(
        self, step: int, state: Any, content: Mapping[str, Any], *, score: float | None = None, wait: bool = False
    ) -> None:
        """Saves in the background, unless the step is there already.

        Args:
          step: Steps done.
          state: A dataclass with a `base`, which is not stored, or any tree.
          content: Stored beside it as JSON.
          score: By which the best checkpoint is told, at steps that are evaluated.
          wait: Whether to return when it is written.

        Raises:
          UserError: This checkpoint or an earlier one cannot be written.
        """
        with self._telling(f"be written at step {step}"):
            if step not in self._manager.all_steps():
                arrays = _arrays(state)
                everything = {
                    "content": dict(content),
                    "settings": self._settings,
                    "base": self._base(state),
                    "arrays": _described(arrays),
                    "checksums": checksum.on_devices(list(arrays.values())),
                }
                self._manager.save(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), content=ocp.args.JsonSave(everything)),
                    metrics={SCORE: self._worst if score is None else score},
                    force=True,
                )
            if wait:
                self._manager.wait_until_finished()

    def restore(self, state: S) -> tuple[S, dict[str, Any] | None]:
        """The last whole checkpoint in the structure of `state`, where its arrays lie, and the content beside it.

        Args:
          state: As it is before the first step; on any mesh.

        Returns:
          The state and content, or `(state, None)` where there is no checkpoint.

        Raises:
          UserError: The checkpoint is of another model, method, base or setting, or none that is there is whole.
        """
        with self._telling("be written"):
            self._manager.wait_until_finished()
        described, base = _described(_arrays(state)), self._base(state)
        step, refused = _NONE, None
        if jax.process_index() == 0:
            try:
                step = self._newest(described, base)
            except UserError as error:
                step, refused = _UNFIT, error
        step = processes.agreed(step)
        if step == _UNFIT:
            raise refused or UserError(f"{self._directory}: cannot be resumed; process 0 says why")
        if step == _NONE:
            return state, None
        self._set_aside([damaged for damaged in self._manager.all_steps() if damaged > step])
        return self._at(step, state)

    def _set_aside(self, steps: list[int]) -> None:
        """Makes room for steps to be saved again; what was there may yet be of use to somebody."""
        with processes.first_before_others(), self._telling("be set aside"):
            for step in steps if processes.is_first() else ():
                aside = self._directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(step)).rename(aside)
        if steps:
            self._manager.reload()

    def best(self, state: S) -> tuple[S, int]:
        """The state that has the best score, in the structure of the last one, and its step.

        Raises:
          UserError: No checkpoint has a score.
        """
        self._manager.wait_until_finished()
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scores = {step: found[SCORE] for step, found in metrics.items() if found and math.isfinite(found[SCORE])}
        if not scores:
            raise UserError(f"{self._directory}: no checkpoint has a score")
        step = self._better(scores, key=lambda step: (scores[step], step))
        return self._at(step, state)[0], step

    def _at(self, step: int, state: S) -> tuple[S, dict[str, Any]]:
        """What the checkpoint of a step holds."""
        arrays = _arrays(state)
        with self._telling(f"be read at step {step}"):
            everything = self._manager.restore(step, args=ocp.args.Composite(content=ocp.args.JsonRestore()))["content"]
            content = everything["content"]
            stored = open_arrays(self._arrays_of(step), arrays, "content")
            plain = [_placed(stored[name], array) for name, array in arrays.items()]
        leaves, structure = jax.tree.flatten(_without_base(state))
        restored = [_like(leaf, array) for leaf, array in zip(leaves, plain)]
        return _with_base(jax.tree.unflatten(structure, restored), state), content

    def _newest(self, described: list[Any], base: str) -> int:
        """The step of the last whole checkpoint; `_NONE` where there is none at all."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step, before in zip(steps, [*steps[1:], None]):
            try:
                everything = self._content(step)
                if not isinstance(everything["content"], dict):
                    raise ValueError("its content is no JSON object")
                problem = self._unfit(described, base, everything["settings"], everything["base"], everything["arrays"])
                if problem is None:
                    self._check(step, described, everything["checksums"])
                    return step
            except Exception as error:  # whatever reading a damaged file raises
                instead = "" if before is None else f"; going on from that of step {before}"
                self._say(f"  the checkpoint of step {step} is damaged ({self._reason(error)}){instead}")
                continue
            raise UserError(f"{self._directory}: the checkpoint of step {step} {problem}; --fresh starts over")
        if steps:
            raise UserError(f"{self._directory}: no checkpoint is whole; --fresh starts over")
        return _NONE

    def _unfit(self, described: list[Any], base: str, settings: Any, stored_base: str, stored: Any) -> str | None:
        """Why a checkpoint is not of this run."""
        if told := differences(settings, self._settings):
            return f"was made with {told}"
        if stored != described:
            return "is of another model or method"
        return None if stored_base == base else "was made on a base with other weights"

    def _check(self, step: int, described: list[Any], checksums: list[list[int]]) -> None:
        target = {
            f"{i:05}": jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for i, (shape, dtype) in enumerate(described)
        }
        arrays = read_arrays(self._arrays_of(step), target, "content")
        for name, expected in zip(target, checksums, strict=True):
            if checksum.on_host(arrays[name]) != expected:
                raise ValueError(f"array {name} is not what was written")

    def _arrays_of(self, step: int) -> Path:
        return self._directory / str(step) / "state"

    def _content(self, step: int) -> Any:
        """The JSON of a step, read on this process alone: there may be an error that the others do not have."""
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=_ALONE)
        with silence_logs(), ocp.Checkpointer(handler, multiprocessing_options=_ALONE) as checkpointer:
            return checkpointer.restore(self._directory / str(step) / "content", args=ocp.args.JsonRestore())

    def _base(self, state: Any) -> str:
        if not self._fingerprint:
            self._fingerprint = checksum.fingerprint(getattr(state, "base", None))
        return self._fingerprint

    def _reason(self, error: BaseException) -> str:
        """What an error says, on one line, without the paths that are clear and the options of the file format."""
        text = printable(str(error)).replace(f"{self._directory}/", "").partition("[tensorstore_spec")[0]
        return textwrap.shorten(text or type(error).__name__, 400, placeholder=" …")

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Turns what a disk refuses into one sentence, and keeps Orbax's own messages about it back."""
        try:
            with silence_logs():
                yield
        except UserError:
            raise
        except Exception as error:
            if processes.is_lost(error) or not is_read_error(error):
                raise
            raise UserError(f"{self._directory}: a checkpoint cannot {what} ({self._reason(error)})") from error


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[SCORE]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that are not the same, each with both values; empty where all are."""
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)}, not {now.get(name)}" for name in names)


def _without_base(state: Any) -> Any:
    """What moves: a training state without its base, or any other tree."""
    return dataclasses.replace(state, base=None) if hasattr(state, "base") else state


def _with_base(state: Any, other: Any) -> Any:
    return dataclasses.replace(state, base=other.base) if hasattr(other, "base") else state


def _arrays(state: Any) -> dict[str, Any]:
    """What is stored: arrays by their place among the leaves, typed keys as their integers."""
    return {f"{i:05}": _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(_without_base(state)))}


def _described(arrays: Mapping[str, Any]) -> list[list[Any]]:
    return [[list(array.shape), str(array.dtype)] for array in arrays.values()]


def _plain(leaf: Any) -> Any:
    """An array that can be stored: a typed key as its integers."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _placed(stored: ts.TensorStore, array: Any) -> Any:
    """A stored array where another one of its shape and dtype is; a device's part alone is read for it."""
    if not isinstance(array, jax.Array):
        return stored.read().result()
    return jax.make_array_from_callback(array.shape, array.sharding, lambda index: stored[index].read().result())


def _like(leaf: Any, stored: Any) -> Any:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(leaf))
    return stored
