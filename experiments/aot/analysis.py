"""Compiles a step ahead of time, and analyzes its memory and its HLO."""

import dataclasses
import re
import time
from typing import Any, Protocol

import jax
from jax.sharding import Mesh

from experiments.aot import cost, hlo
from experiments.aot.cost import Cost
from experiments.aot.memory import argument_bytes
from experiments.aot.roofline import Roofline, roofline
from experiments.aot.topology import Topology
from experiments.training.chips import GIB

_SIZE = r"([\d.]+)([KMGT]?)"
_USED = re.compile(rf"Used {_SIZE} of {_SIZE} hbm")
_NEEDS = re.compile(rf"\({_SIZE}\) exceeds available HBM \({_SIZE}\)")
_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}


class Step(Protocol):
    """A step that can be analyzed."""

    @property
    def mesh(self) -> Mesh: ...

    @property
    def tokens(self) -> int: ...

    def lower(self) -> jax.stages.Lowered: ...

    def parts(self) -> dict[str, Any]: ...


class DoesNotFit(Exception):
    """The step does not fit the memory of a chip.

    Attributes:
      needed: The bytes that it needs on one chip.
      available: The bytes that are available.
      advice: Changes that would make it fit.
    """

    def __init__(self, needed: int, available: int, advice: str = ""):
        self.needed, self.available, self.advice = needed, available, advice
        super().__init__(f"needs {needed / GIB:.2f} GiB of each chip, which has {available / GIB:.2f} GiB")


@dataclasses.dataclass(frozen=True)
class Memory:
    """The memory of a step on one chip, in bytes.

    Attributes:
      parts: The step's arguments by name, including the padding of their layouts.
      temporaries: The memory beyond the arguments at the peak.
      program: The program's code.
      total: The memory at the peak.
      host: The host's memory per chip.
      capacity: The memory that is available to programs.
    """

    parts: dict[str, int]
    temporaries: int
    program: int
    total: int
    host: int
    capacity: int


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A compiled step.

    Attributes:
      memory: The memory on one chip.
      cost: The cost of one run on one chip.
      roofline: The lower bound of its time.
      model_flops: The model's operations in a step, on all chips.
      tokens: The number of tokens of a step.
      chips: The number of chips.
      seconds: The compile time.
    """

    memory: Memory
    cost: Cost
    roofline: Roofline
    model_flops: float
    tokens: int
    chips: int
    seconds: float


def analyze(step: Step, topology: Topology, model_flops: float) -> Analysis:
    """Compiles a step and analyzes it.

    Args:
      step: A step for the devices of `topology`.
      topology: The slice.
      model_flops: The model's operations in a step, on all chips.

    Raises:
      DoesNotFit: XLA reports that the step does not fit the chips' memory.
    """
    start = time.perf_counter()
    try:
        compiled = step.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise _parse_error(error, topology) from error
    seconds = time.perf_counter() - start
    counted = cost.cost(hlo.parse(compiled.as_text() or ""))
    devices = step.mesh.devices
    bound = roofline(counted, topology, devices, model_flops)
    memory = _memory(compiled, step.parts(), topology)
    return Analysis(memory, counted, bound, model_flops, step.tokens, devices.size, seconds)


def _memory(compiled: jax.stages.Compiled, parts: dict[str, Any], topology: Topology) -> Memory:
    memory: Any = compiled.memory_analysis()
    sizes = {name: argument_bytes(tree)[0] for name, tree in parts.items()}
    # The peak includes arguments in the host's memory.
    peak = memory.peak_memory_in_bytes - memory.host_argument_size_in_bytes
    temporaries = max(peak - memory.argument_size_in_bytes, memory.output_size_in_bytes - memory.alias_size_in_bytes)
    program = memory.generated_code_size_in_bytes
    total = memory.argument_size_in_bytes + temporaries + program
    host = memory.host_argument_size_in_bytes + memory.host_temp_size_in_bytes
    return Memory(sizes, temporaries, program, total, host, topology.chip.memory)


def _parse_error(error: jax.errors.JaxRuntimeError, topology: Topology) -> Exception:
    """Converts XLA's out-of-memory error to a DoesNotFit; returns other errors unchanged."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    match = _USED.search(text) or _NEEDS.search(text)
    if match is None:
        return error
    return DoesNotFit(_bytes(match[1], match[2]), _bytes(match[3], match[4]) or topology.chip.memory)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
