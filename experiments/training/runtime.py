"""Settings of devices, processes and the profiler, which configs share."""

import re
from dataclasses import dataclass, field

from experiments.training.mesh_sizes import MeshSizes


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """A base class of configs."""

    mesh: MeshSizes = field(default_factory=MeshSizes)
    """The mesh of devices; the default is one device."""

    distributed: bool = False
    """Run as one of several processes that all run this command. TPU pods and Slurm are detected; elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID."""

    profile: str | None = None
    """FIRST:LAST, the steps to profile. The trace is written to the run's directory."""

    def __post_init__(self) -> None:
        self.profiled_steps()

    def profiled_steps(self) -> range:
        """Returns the steps to profile; empty by default."""
        if self.profile is None:
            return range(0)
        match = re.fullmatch(r"(\d+):(\d+)", self.profile)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"profile must be FIRST:LAST, two steps from 1 on as in 10:15, not {self.profile!r}")
        return range(int(match[1]), int(match[2]) + 1)
