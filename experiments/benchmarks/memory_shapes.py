"""The Llama-shaped models of the memory benchmark and their numbers of parameters."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """A model's sizes."""

    layers: int
    width: int
    hidden: int
    heads: int
    vocabulary: int = 32_000

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of each linear layer of a block: query, key, value, output; gate, up, down."""
        width, hidden = self.width, self.hidden
        return (*((width, width),) * 4, *((width, hidden),) * 2, (hidden, width))

    @property
    def block(self) -> int:
        """The number of weights in the linear layers of a block."""
        return sum(n_in * n_out for n_in, n_out in self.linears)

    @property
    def others(self) -> int:
        """The number of other parameters: embedding, head and norms."""
        return 2 * self.vocabulary * self.width + (2 * self.layers + 1) * self.width

    @property
    def parameters(self) -> int:
        """The number of all parameters."""
        return self.layers * self.block + self.others

    def factors(self, rank: int) -> int:
        """The number of parameters of adapters on all linear layers."""
        return self.layers * rank * sum(n_in + n_out for n_in, n_out in self.linears)


SIZES = {
    "7B": Shape(32, 4096, 11_008, 32),
    "13B": Shape(40, 5120, 13_824, 40),
    "33B": Shape(60, 6656, 17_920, 52),
    "65B": Shape(80, 8192, 22_016, 64),
}
"""LLaMA's sizes."""

SMALL = Shape(12, 768, 2048, 12, vocabulary=8192)
"""97 million parameters, for a CPU."""
