"""Checkpoints of a training run: the state without its base, a JSON, and a fingerprint of the base."""

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
_NONE, _UNFIT = -1, -2  # instead of a step
_ALONE = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="alone")


class Checkpoints:
    """Saves training states by step, and restores the last intact one on any mesh and any number of processes.

    The last two checkpoints are kept, and the one with the best score. The arrays of a state, without its base, are
    stored in the order of its leaves. The structure and all static values come from the state that the same settings
    create again. Checkpoints are written atomically. Checksums detect files that are damaged later; such checkpoints
    are skipped. The context manager waits for pending writes. All processes must make the same calls.

    Args:
      directory: The directory, which all processes share; created if it does not exist.
      best: Whether higher or lower scores are better.
      settings: The settings that determine the results of a run, as JSON values. A checkpoint with other settings is
        an error.
      say: Prints a line about skipped checkpoints.
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
        self._worst = -math.inf if best == "max" else math.inf  # the score of steps without a score
        self._fingerprint = ""
        policies = [managers.LatestN(2), managers.BestN(get_metric_fn=_score, reverse=best == "min", n=1)]
        options = ocp.CheckpointManagerOptions(
            best_fn=_score,  # required for scores to be written
            preservation_policy=managers.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
        )
        with self._reporting("be opened"):
            self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            with self._reporting("be written"):
                self._manager.close()
            return
        try:
            self._manager.close()
        except Exception as other:  # the error that is being raised came first
            self._say(f"{self._directory}: the last checkpoint may be missing ({self._reason(other)})")

    def save(
        self, step: int, state: Any, content: Mapping[str, Any], *, score: float | None = None, wait: bool = False
    ) -> None:
        """Saves in the background, unless the step is saved already.

        Args:
          step: The number of completed steps.
          state: A dataclass with a `base`, which is not stored, or any tree.
          content: JSON that is stored with the state.
          score: The validation score, at steps that are evaluated.
          wait: Whether to wait until it is written.

        Raises:
          UserError: This checkpoint or an earlier one cannot be written.
        """
        with self._reporting(f"be written at step {step}"):
            if step not in self._manager.all_steps():
                arrays = _arrays(state)
                record = {
                    "content": dict(content),
                    "settings": self._settings,
                    "base": self._base(state),
                    "arrays": _describe(arrays),
                    "checksums": checksum.device_checksums(list(arrays.values())),
                }
                self._manager.save(
                    step,
                    args=ocp.args.Composite(state=ocp.args.StandardSave(arrays), content=ocp.args.JsonSave(record)),
                    metrics={SCORE: self._worst if score is None else score},
                    force=True,
                )
            if wait:
                self._manager.wait_until_finished()

    def restore(self, state: S) -> tuple[S, dict[str, Any] | None]:
        """Restores the last intact checkpoint with the structure and the shardings of `state`.

        Args:
          state: The initial state, on any mesh.

        Returns:
          The state and content, or `(state, None)` if there is no checkpoint.

        Raises:
          UserError: The checkpoint has another model, method, base or settings, or no checkpoint is intact.
        """
        with self._reporting("be written"):
            self._manager.wait_until_finished()
        described, base = _describe(_arrays(state)), self._base(state)
        step, problem = _NONE, None
        if jax.process_index() == 0:
            try:
                step = self._newest(described, base)
            except UserError as error:
                step, problem = _UNFIT, error
        step = processes.broadcast(step)
        if step == _UNFIT:
            raise problem or UserError(f"{self._directory}: cannot be resumed; see the output of process 0")
        if step == _NONE:
            return state, None
        self._set_aside([damaged for damaged in self._manager.all_steps() if damaged > step])
        return self._at(step, state)

    def _set_aside(self, steps: list[int]) -> None:
        """Renames damaged checkpoints, so that their steps can be saved again."""
        with processes.first_before_others(), self._reporting("be set aside"):
            for step in steps if processes.is_first() else ():
                aside = self._directory / f"damaged-{step}"
                shutil.rmtree(aside, ignore_errors=True)
                (self._directory / str(step)).rename(aside)
        if steps:
            self._manager.reload()

    def best(self, state: S) -> tuple[S, int]:
        """Returns the state with the best score, in the structure of `state`, and its step.

        Raises:
          UserError: No checkpoint has a score.
        """
        self._manager.wait_until_finished()
        metrics = {step: self._manager.metrics(step) for step in self._manager.all_steps()}
        scores = {step: values[SCORE] for step, values in metrics.items() if values and math.isfinite(values[SCORE])}
        if not scores:
            raise UserError(f"{self._directory}: no checkpoint has a score")
        step = self._better(scores, key=lambda step: (scores[step], step))
        return self._at(step, state)[0], step

    def _at(self, step: int, state: S) -> tuple[S, dict[str, Any]]:
        """Returns the state and the content of the checkpoint of a step."""
        arrays = _arrays(state)
        with self._reporting(f"be read at step {step}"):
            record = self._manager.restore(step, args=ocp.args.Composite(content=ocp.args.JsonRestore()))["content"]
            content = record["content"]
            stored = open_arrays(self._arrays_of(step), arrays, "content")
            plain = [_load_like(stored[name], array) for name, array in arrays.items()]
        leaves, structure = jax.tree.flatten(_without_base(state))
        restored = [_like(leaf, array) for leaf, array in zip(leaves, plain)]
        return _with_base(jax.tree.unflatten(structure, restored), state), content

    def _newest(self, described: list[Any], base: str) -> int:
        """Returns the step of the last intact checkpoint; `_NONE` without checkpoints."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        for step, previous in zip(steps, [*steps[1:], None]):
            try:
                record = self._content(step)
                if not isinstance(record["content"], dict):
                    raise ValueError("its content is not a JSON object")
                problem = self._mismatch(described, base, record["settings"], record["base"], record["arrays"])
                if problem is None:
                    self._check(step, described, record["checksums"])
                    return step
            except Exception as error:  # reading a damaged file may raise any exception
                next_try = "" if previous is None else f"; going on from that of step {previous}"
                self._say(f"  the checkpoint of step {step} is damaged ({self._reason(error)}){next_try}")
                continue
            raise UserError(f"{self._directory}: the checkpoint of step {step} {problem}; --fresh starts over")
        if steps:
            raise UserError(f"{self._directory}: no checkpoint is intact; --fresh starts over")
        return _NONE

    def _mismatch(self, described: list[Any], base: str, settings: Any, stored_base: str, stored: Any) -> str | None:
        """Describes why a checkpoint does not belong to this run; None if it does."""
        if changes := differences(settings, self._settings):
            return f"was made with {changes}"
        if stored != described:
            return "is of another model or method"
        return None if stored_base == base else "was made on a base with other weights"

    def _check(self, step: int, described: list[Any], checksums: list[list[int]]) -> None:
        target = {
            f"{i:05}": jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype)) for i, (shape, dtype) in enumerate(described)
        }
        arrays = read_arrays(self._arrays_of(step), target, "content")
        for name, expected in zip(target, checksums, strict=True):
            if checksum.host_checksum(arrays[name]) != expected:
                raise ValueError(f"array {name} is not what was written")

    def _arrays_of(self, step: int) -> Path:
        return self._directory / str(step) / "state"

    def _content(self, step: int) -> Any:
        """Reads the JSON of a step in this process only, since an error may occur in one process only."""
        handler = ocp.JsonCheckpointHandler(multiprocessing_options=_ALONE)
        with silence_logs(), ocp.Checkpointer(handler, multiprocessing_options=_ALONE) as checkpointer:
            return checkpointer.restore(self._directory / str(step) / "content", args=ocp.args.JsonRestore())

    def _base(self, state: Any) -> str:
        if not self._fingerprint:
            self._fingerprint = checksum.fingerprint(getattr(state, "base", None))
        return self._fingerprint

    def _reason(self, error: BaseException) -> str:
        """Returns an error's message on one line, without the directory and the options of the file format."""
        text = printable(str(error)).replace(f"{self._directory}/", "").partition("[tensorstore_spec")[0]
        return textwrap.shorten(text or type(error).__name__, 400, placeholder=" …")

    @contextmanager
    def _reporting(self, what: str) -> Iterator[None]:
        """Converts errors of reading and writing to a UserError, without Orbax's own messages."""
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
    """Lists the settings that differ, with both values; empty if all are equal."""
    before, now = _by_flag(before), _by_flag(now)
    names = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    return ", ".join(f"{name} {before.get(name)}, not {now.get(name)}" for name in names)


def _by_flag(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns settings by the names of their flags, in which those of a group follow a dot.

    Example:
      >>> _by_flag({"rank": 2, "batch": {"global_": 8}})
      {'rank': 2, 'batch.global': 8}
    """
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flag = prefix + name.strip("_")
        flat |= _by_flag(value, f"{flag}.") if isinstance(value, Mapping) else {flag: value}
    return flat


def _without_base(state: Any) -> Any:
    """Returns a training state without its base; any other tree unchanged."""
    return dataclasses.replace(state, base=None) if hasattr(state, "base") else state


def _with_base(state: Any, other: Any) -> Any:
    return dataclasses.replace(state, base=other.base) if hasattr(other, "base") else state


def _arrays(state: Any) -> dict[str, Any]:
    """Returns the arrays to store by the index of their leaf; typed keys as integers."""
    return {f"{i:05}": _plain(leaf) for i, leaf in enumerate(jax.tree.leaves(_without_base(state)))}


def _describe(arrays: Mapping[str, Any]) -> list[list[Any]]:
    return [[list(array.shape), str(array.dtype)] for array in arrays.values()]


def _plain(leaf: Any) -> Any:
    """Returns an array that can be stored; a typed key as integers."""
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(leaf)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _load_like(stored: ts.TensorStore, array: Any) -> Any:
    """Loads a stored array with the sharding of `array`; each device reads its shard only."""
    if not isinstance(array, jax.Array):
        return stored.read().result()
    return jax.make_array_from_callback(array.shape, array.sharding, lambda index: stored[index].read().result())


def _like(leaf: Any, stored: Any) -> Any:
    if isinstance(leaf, jax.Array) and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(leaf))
    return stored
