"""The least time that a step takes, by the published figures of its chips.

Products, memory and links are taken to work at the same time and at full speed, so that the slowest of them is the
bound: a real step is slower.

Reference:
  Williams et al., `Roofline <https://doi.org/10.1145/1498765.1498785>`_, 2009
"""

import dataclasses

import numpy as np

from experiments.aot.cost import Cost, Exchange
from experiments.aot.topology import Topology


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step on one chip.

    Attributes:
      compute: Of its products, recomputed ones included.
      memory: Of its traffic with the chip's memory.
      links: Of what it sends to other chips.
      model: Of the products that the model needs, none of them twice.
    """

    compute: float
    memory: float
    links: float
    model: float

    @property
    def seconds(self) -> float:
        """The bound."""
        return max(self.compute, self.memory, self.links)

    @property
    def limit(self) -> str:
        """What takes longest."""
        terms = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(terms, key=lambda name: terms[name])

    @property
    def mfu(self) -> float:
        """The model's operations by what the chip could do in that time: the most that can be reached.

        Recomputation counts for nothing (`model FLOPs utilisation <https://arxiv.org/abs/2204.02311>`_, appendix B).
        """
        return self.model / self.seconds


def roofline(cost: Cost, topology: Topology, devices: np.ndarray, model_flops: float) -> Roofline:
    """The bound of a compiled step.

    Args:
      cost: Of the step on one chip.
      topology: Of the chips.
      devices: Those of the step's mesh, in its order.
      model_flops: Operations of the model in a step, on all chips.
    """
    chip = topology.chip
    flat = np.asarray(devices).reshape(-1)
    return Roofline(
        compute=cost.flops / chip.flops,
        memory=cost.traffic.device / chip.bandwidth,
        links=sum(one.sent * one.times / (links(one, topology, flat) * chip.link) for one in cost.exchanges),
        model=model_flops / flat.size / chip.flops,
    )


def links(one: Exchange, topology: Topology, devices: np.ndarray) -> int:
    """How many of a chip's links an exchange can use: those of the group that has the fewest."""
    groups = _connected(one.groups) if one.kind == "collective-permute" else one.groups
    return min((topology.links(devices[list(group)].tolist()) for group in groups if len(group) > 1), default=1)


def _connected(pairs: np.ndarray) -> list[list[int]]:
    """The chips that senders and receivers join, directly or through others."""
    group = {number: {number} for number in np.unique(pairs).tolist()}
    for source, target in pairs.tolist():
        if group[source] is not group[target]:
            joined = group[source] | group[target]
            for number in joined:
                group[number] = joined
    return [sorted(members) for members in {id(members): members for members in group.values()}.values()]
