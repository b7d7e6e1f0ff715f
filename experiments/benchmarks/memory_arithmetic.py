"""An estimate of the memory of a training step by its parts, which is compared with XLA's analysis."""

import dataclasses
import math

from experiments.benchmarks.memory_shapes import Shape

NF4_BLOCK, SECOND_BLOCK = 64, 256
MOMENTS = {"sgd": 0, "momentum": 4, "adam": 2 * 4}
"""Bytes of the float32 moments of each optimizer per trained parameter."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """A model and a method to train it.

    Attributes:
      shape: The model's shape.
      method: 'full', 'lora' or 'qlora'.
      bytes: Bytes per weight and per activation (2: bfloat16; 4: float32).
      adapter_bytes: Bytes per number of an adapter.
      rank: The rank of every adapter.
      tokens: The length of the only sequence of the batch.
      plain: Whether the whole quantized base is dequantized before the model is called.
      on_host: Whether the optimizer's moments are in the host's memory.
      optimizer: 'adam' (AdamW), 'momentum' (SGD with momentum) or 'sgd'.
    """

    shape: Shape
    method: str
    bytes: int = 2
    adapter_bytes: int = 4
    rank: int = 64
    tokens: int = 512
    plain: bool = False
    on_host: bool = False
    optimizer: str = "adam"

    @property
    def trained(self) -> int:
        """The number of trained parameters."""
        return self.shape.parameters if self.method == "full" else self.shape.factors(self.rank)

    @property
    def quantized(self) -> int:
        """Bytes of the quantized weights: codes, scales in eight bits, scales of these, and their mean."""
        shape = self.shape
        number = sum(math.ceil(n_in / NF4_BLOCK) * n_out for n_in, n_out in shape.linears)
        second = sum(math.ceil(math.ceil(i / NF4_BLOCK) * o / SECOND_BLOCK) for i, o in shape.linears)
        return shape.layers * (number * NF4_BLOCK // 2 + number + 4 * second + 4 * len(shape.linears))

    @property
    def base(self) -> int:
        """Bytes of the parameters; in full fine-tuning they are trained."""
        others = self.bytes * self.shape.others
        if self.method == "qlora":
            return others + self.quantized
        return others + self.bytes * self.shape.layers * self.shape.block

    @property
    def delta(self) -> int:
        """Bytes of the adapters without their scales, which are at most one number per layer."""
        return 0 if self.method == "full" else self.adapter_bytes * self.trained

    @property
    def moments(self) -> int:
        """Bytes of the optimizer's state, on the device or the host."""
        return MOMENTS[self.optimizer] * self.trained

    @property
    def items(self) -> dict[str, int]:
        """The necessary temporaries of a step, in bytes."""
        shape = self.shape
        items = {
            "activations": self.bytes * shape.layers * self.tokens * shape.width,
            "logits": 4 * self.tokens * shape.vocabulary,
            "weights": 0,
            "gradients": (self.bytes if self.method == "full" else self.adapter_bytes) * self.trained,
        }
        if self.method == "qlora":
            items["weights"] = self.bytes * shape.block * (shape.layers if self.plain else 1)
        return items

    @property
    def temporaries(self) -> int:
        """The sum of the temporaries."""
        return sum(self.items.values())

    @property
    def device(self) -> int:
        """All bytes on the device."""
        return self.base + self.delta + self.temporaries + (0 if self.on_host else self.moments)
