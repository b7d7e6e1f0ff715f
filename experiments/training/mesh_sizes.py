"""The sizes of a run's device mesh."""

from dataclasses import dataclass

from experiments.models.options import Shards

DATA, FSDP, TENSOR = NAMES = ("data", "fsdp", "tensor")
BATCH = (DATA, FSDP)


@dataclass(frozen=True)
class MeshSizes:
    """The number of devices along each mesh axis. A run uses as many devices as their product."""

    data: int = 1
    """Number of copies of the base. Each copy processes an equal part of the batch."""

    fsdp: int = 1
    """Number of shards of each weight and of the batch. A weight is gathered when it is used."""

    tensor: int = 1
    """Number of shards of each layer's heads and hidden width."""

    sequence: bool = False
    """Whether the tokens of a sequence are sharded over the tensor axis between layers."""

    def __post_init__(self) -> None:
        for name in NAMES:
            if getattr(self, name) < 1:
                raise ValueError(f"mesh.{name} must be positive, not {getattr(self, name)}")
        if self.sequence and self.tensor == 1:
            raise ValueError("mesh.sequence shards tokens over the tensor axis, but mesh.tensor is 1")

    @property
    def count(self) -> int:
        """Number of devices."""
        return self.data * self.fsdp * self.tensor

    @property
    def replicas(self) -> int:
        """Number of parts of a batch."""
        return self.data * self.fsdp

    @property
    def shards(self) -> Shards:
        """The mesh axes that shard a model's activations."""
        return Shards(BATCH, TENSOR, TENSOR if self.sequence else None)

    def __str__(self) -> str:
        sizes = " × ".join(f"{name} {getattr(self, name)}" for name in NAMES)
        return sizes + (", sequences over tensor" if self.sequence else "")
