"""Runs the study of a config, and reports what ends it early."""

import importlib
from typing import Any

import jax

from experiments import startup, user_cache
from experiments.training import processes
from experiments.training.interrupt import terminable

_LOST = 76


def execute(config: Any) -> int:
    """Runs the study of a config.

    Args:
      config: A config; its `STUDY` names the module whose `run` takes it.

    Returns:
      The exit status; see :func:`experiments.command_line.main`.
    """
    keep_compiled()
    joined, status = getattr(config, "distributed", False), 0
    try:
        with processes.distributed() if joined else terminable():
            importlib.import_module(config.STUDY).run(config)
    except BaseException as error:
        reported = _report(error)
        if reported is None:
            raise
        status = reported
    if joined and status:
        processes.end(status)
    return status


def keep_compiled() -> None:
    """Enables JAX's persistent compilation cache, in the user's cache directory unless one is configured."""
    if jax.config.jax_compilation_cache_dir is None:  # pyrefly: ignore[missing-attribute]
        jax.config.update("jax_compilation_cache_dir", str(user_cache.directory("compiled")))


def _report(error: BaseException) -> int | None:
    """Prints an error that a user can do something about, and returns the exit status; None for other exceptions."""
    if isinstance(error, processes.LostProcess):
        return startup.print_error(_LOST, f"error: {error}; restart all processes to resume")
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
        return startup.print_error(
            2,
            f"error: out of memory ({str(error).strip().splitlines()[0]}); use a smaller batch, more devices or more "
            "rematerialization; experiments.compile_for_pod computes the memory of a step",
        )
    return startup.report(error)
