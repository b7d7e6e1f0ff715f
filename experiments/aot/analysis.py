"""A step compiled for chips that are not here, and what XLA and its HLO say of it."""

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
    """What can be analyzed."""

    @property
    def mesh(self) -> Mesh: ...

    @property
    def tokens(self) -> int: ...

    def lower(self) -> jax.stages.Lowered: ...

    def parts(self) -> dict[str, Any]: ...


class DoesNotFit(Exception):
    """XLA found no way to run the step in a chip's memory.

    Attributes:
      needed: Bytes that it would take, of one chip.
      available: Bytes that there are.
      advice: What would make it fit.
    """

    def __init__(self, needed: int, available: int, advice: str = ""):
        self.needed, self.available, self.advice = needed, available, advice
        super().__init__(f"needs {needed / GIB:.2f} GiB of each chip, which has {available / GIB:.2f} GiB")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one chip.

    Attributes:
      parts: What the step is given, by name, with the padding of its layout.
      temporaries: What it holds beside that at the worst moment.
      program: Its code.
      total: All at the worst moment.
      host: Of the host's memory, for one chip.
      capacity: What there is for programs.
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
      memory: Of one chip.
      cost: Of one run on one chip.
      roofline: Its bound.
      model_flops: Operations that the model needs for a step, on all chips.
      tokens: Of a step.
      chips: That run it.
      seconds: That compiling took.
    """

    memory: Memory
    cost: Cost
    roofline: Roofline
    model_flops: float
    tokens: int
    chips: int
    seconds: float


def analyze(step: Step, topology: Topology, model_flops: float) -> Analysis:
    """Compiles a step and counts.

    Args:
      step: For the devices of `topology`.
      topology: The chips.
      model_flops: Operations that the model needs for a step, on all chips.

    Raises:
      DoesNotFit: XLA says that the chips' memory does not hold it.
    """
    began = time.perf_counter()
    try:
        compiled = step.lower().compile()
    except jax.errors.JaxRuntimeError as error:
        raise _understood(error, topology) from error
    seconds = time.perf_counter() - began
    counted = cost.cost(hlo.parse(compiled.as_text() or ""))
    devices = step.mesh.devices
    bound = roofline(counted, topology, devices, model_flops)
    memory = _memory(compiled, step.parts(), topology)
    return Analysis(memory, counted, bound, model_flops, step.tokens, devices.size, seconds)


def _memory(compiled: jax.stages.Compiled, parts: dict[str, Any], topology: Topology) -> Memory:
    said: Any = compiled.memory_analysis()
    sizes = {name: argument_bytes(tree)[0] for name, tree in parts.items()}
    # The peak counts what lies in the host's memory too.
    peak = said.peak_memory_in_bytes - said.host_argument_size_in_bytes
    beside = max(peak - said.argument_size_in_bytes, said.output_size_in_bytes - said.alias_size_in_bytes)
    program = said.generated_code_size_in_bytes
    total = said.argument_size_in_bytes + beside + program
    host = said.host_argument_size_in_bytes + said.host_temp_size_in_bytes
    return Memory(sizes, beside, program, total, host, topology.chip.memory)


def _understood(error: jax.errors.JaxRuntimeError, topology: Topology) -> Exception:
    """Memory that is exhausted, as a number; what else XLA has to say stays its own."""
    text = str(error)
    if "RESOURCE_EXHAUSTED" not in text:
        return error
    found = _USED.search(text) or _NEEDS.search(text)
    if found is None:
        return error
    return DoesNotFit(_bytes(found[1], found[2]), _bytes(found[3], found[4]) or topology.chip.memory)


def _bytes(number: str, unit: str) -> int:
    return int(float(number) * _UNITS[unit])
