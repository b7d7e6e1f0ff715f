"""A lower bound on the time of a step, from the published specifications of its chips.

Products, memory and links are assumed to work at the same time and at full speed, so the slowest of them is the bound.
A real step is slower.

References:
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
      compute: The time of its products, including recomputation.
      memory: The time of its traffic with the chip's memory.
      links: The time of its exchanges with other chips.
      model: The time of the model's products, without recomputation.
    """

    compute: float
    memory: float
    links: float
    model: float

    @property
    def seconds(self) -> float:
        """The lower bound."""
        return max(self.compute, self.memory, self.links)

    @property
    def limit(self) -> str:
        """The resource that determines the bound."""
        terms = {"compute": self.compute, "memory": self.memory, "links": self.links}
        return max(terms, key=lambda name: terms[name])

    @property
    def mfu(self) -> float:
        """The maximum `model FLOPs utilization <https://arxiv.org/abs/2204.02311>`_ (appendix B).

        It is the ratio of the model's operations, without recomputation, to the chip's peak in the time of the bound.
        """
        return self.model / self.seconds


def roofline(cost: Cost, topology: Topology, devices: np.ndarray, model_flops: float) -> Roofline:
    """Returns the bound of a compiled step.

    Args:
      cost: The cost of the step on one chip.
      topology: The slice.
      devices: The devices of the step's mesh, in its order.
      model_flops: The model's operations in a step, on all chips.
    """
    chip = topology.chip
    flat = np.asarray(devices).reshape(-1)
    return Roofline(
        compute=cost.flops / chip.flops,
        memory=cost.traffic.device / chip.bandwidth,
        links=sum(
            exchange.sent * exchange.times / (usable_links(exchange, topology, flat) * chip.link)
            for exchange in cost.exchanges
        ),
        model=model_flops / flat.size / chip.flops,
    )


def usable_links(exchange: Exchange, topology: Topology, devices: np.ndarray) -> int:
    """Returns the number of a chip's links that an exchange can use, which is the minimum over its groups."""
    groups = _connected(exchange.groups) if exchange.kind == "collective-permute" else exchange.groups
    return min((topology.links(devices[list(group)].tolist()) for group in groups if len(group) > 1), default=1)


def _connected(pairs: np.ndarray) -> list[list[int]]:
    """Returns the connected components of senders and receivers."""
    group = {number: {number} for number in np.unique(pairs).tolist()}
    for source, target in pairs.tolist():
        if group[source] is not group[target]:
            joined = group[source] | group[target]
            for number in joined:
                group[number] = joined
    return [sorted(members) for members in {id(members): members for members in group.values()}.values()]
