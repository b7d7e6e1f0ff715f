"""Where and how a run computes: settings that configs have in common."""

import re
from dataclasses import dataclass, field

from experiments.training.mesh import MeshSizes


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """To be a base of a study's config."""

    mesh: MeshSizes = field(default_factory=MeshSizes)
    """The mesh of devices; the default is one device."""

    distributed: bool = False
    """Run as one of several processes that all run this command. TPU pods and Slurm are detected; elsewhere set
    JAX_COORDINATOR_ADDRESS (host:port of the first process), JAX_NUM_PROCESSES and JAX_PROCESS_ID."""

    profile: str | None = None
    """FIRST:LAST, the steps to profile. The trace is written to the run's directory."""

    def __post_init__(self) -> None:
        self.profiled()

    def profiled(self) -> range:
        """The steps to trace; none is the default."""
        if self.profile is None:
            return range(0)
        found = re.fullmatch(r"(\d+):(\d+)", self.profile)
        if found is None or not 1 <= int(found[1]) <= int(found[2]):
            raise ValueError(f"profile is FIRST:LAST, two steps from 1 on as in 10:15, not {self.profile!r}")
        return range(int(found[1]), int(found[2]) + 1)
