"""The optimized HLO that XLA prints, as computations of instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

DEVICE, HOST = 0, 5
"""Memory spaces in layouts: the device's memory (HBM), and the host's. Others are on the chip."""

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_TOKEN = re.compile(
    r"(?P<dtype>[a-z][a-z0-9]*)\[(?P<dims>[^\]]*)\](?:\{(?P<minor>[\d,]*)(?::(?P<layout>(?:[A-Z*#]\w*(?:\([^)]*\))?|\([^)]*\))*))?\})?"
)
_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array's type.

    Attributes:
      dtype: As XLA writes it.
      dims: Sizes.
      minor_to_major: The order of the axes in memory, the fastest first.
      tile: The first level of tiling, to whose multiples the last axes in memory are padded.
      space: The memory space.
      bits: Of an element in memory.
    """

    dtype: str
    dims: tuple[int, ...]
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()
    space: int = DEVICE
    bits: int = 8

    @property
    def elements(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Of the numbers alone."""
        return -(-self.elements * self.bits // 8)

    @property
    def padded(self) -> int:
        """Bytes in memory, the padding of the tiles included."""
        sizes = [self.dims[axis] for axis in reversed(self.minor_to_major)] or list(self.dims)
        tile = self.tile[-len(sizes) :] if sizes else ()
        for place, multiple in enumerate(reversed(tile), start=1):
            sizes[-place] = -(-sizes[-place] // multiple) * multiple
        return -(-math.prod(sizes) * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: Unique in its module.
      shapes: The arrays of its result, those of tuples in tuples in their order.
      nested: For each element of a tuple, how many of `shapes` it is; empty where the result is no tuple.
      opcode: What it does.
      operands: Names; what a constant or a parameter has in brackets is in `inside`.
      inside: The text in the brackets.
      attributes: The text after them.
    """

    name: str
    shapes: tuple[Array, ...]
    nested: tuple[int, ...]
    opcode: str
    operands: tuple[str, ...]
    inside: str
    attributes: str

    @property
    def shape(self) -> Array:
        """Of a result that is one array."""
        return self.shapes[0]

    def called(self, role: str) -> str | None:
        """The computation that an attribute (`body`, `calls`, `to_apply` …) names."""
        found = re.search(rf"(?<!\w){role}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None

    def branches(self) -> list[str]:
        """The computations of a conditional."""
        found = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if found:
            return [name.strip().lstrip("%") for name in found[1].split(",")]
        return [name for role in ("true_computation", "false_computation") if (name := self.called(role))]

    def axes(self, attribute: str) -> tuple[int, ...]:
        """The numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        found = re.search(rf"(?<!\w){attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(axis) for axis in found[1].split(",") if axis) if found else ()

    def value(self, attribute: str) -> str | None:
        """The word that an attribute such as `direction=LT` or `custom_call_target="…"` has."""
        found = re.search(rf'(?<!\w){attribute}="?([^",\s]+)', self.attributes)
        return found[1] if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the module: its instructions by name, in the order in which they run."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """By number."""
        return {int(one.inside): one for one in self if one.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Of each instruction, those that have it as an operand."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for one in self:
            for name in dict.fromkeys(one.operands):
                users[name].append(one)
        return users

    def operand(self, one: Instruction, number: int = 0) -> Instruction:
        return self.instructions[one.operands[number]]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: By name.
      entry: What runs.
      partitions: How many devices run it, each its part.
    """

    computations: dict[str, Computation]
    entry: Computation
    partitions: int


def parse(text: str) -> Module:
    """Reads what `jax.stages.Compiled.as_text()` gives.

    Args:
      text: The optimized HLO of one module.

    Raises:
      ValueError: It is no HLO, or has an instruction of an unknown form.
    """
    computations, entry, name, is_entry = {}, None, None, False
    pending: list[str] = []
    for line in text.splitlines():
        if name is None:
            head = _HEAD.match(line)
            if head:
                is_entry, name, pending = bool(head[1]), head[2], []
        elif line == "}":
            made = _computation(name, pending)
            computations[name] = made
            entry, name = made if is_entry else entry, None
        elif _INSTRUCTION.match(line):
            pending.append(line)
        else:  # a string with line breaks, as the metadata of kernels have
            pending[-1] += line
    if entry is None:
        raise ValueError(f"This is no HLO module: it has no ENTRY. It begins with {text[:60]!r}.")
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, None
    for line in lines:
        one = _instruction(line)
        instructions[one.name] = one
        if line.lstrip().startswith("ROOT "):
            root = one
    if root is None:
        raise ValueError(f"The computation {name} has no ROOT.")
    return Computation(name, instructions, root)


def _instruction(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    assert head is not None
    rest = line[head.end() :]
    shapes, nested, rest = _shape(rest)
    opcode, _, rest = rest.lstrip().partition("(")
    end = _closing(rest)
    inside = rest[:end]
    plain = opcode in ("constant", "parameter")
    operands = () if plain else tuple(re.findall(r"%([\w.\-]+)", _COMMENT.sub("", inside)))
    return Instruction(head[2], shapes, nested, opcode, operands, inside, rest[end + 1 :])


def _shape(text: str) -> tuple[tuple[Array, ...], tuple[int, ...], str]:
    """The arrays of a type at the beginning of a text, how many each element of a tuple has, and the rest."""
    if not text.startswith("("):
        found = _TOKEN.match(text)
        if found is None:
            raise ValueError(f"No type of HLO: {text[:80]!r}.")
        return (_array(found),), (), text[found.end() :]
    end = _closing(text[1:]) + 1
    inner, arrays, nested = _COMMENT.sub("", text[1:end]).strip(), [], []
    while inner:
        made, _, inner = _shape(inner)
        arrays += made
        nested.append(len(made))
        inner = inner.lstrip(", ")
    return tuple(arrays), tuple(nested), text[end + 1 :]


@functools.lru_cache(maxsize=65_536)
def _typed(dtype: str, dims: str, minor: str, layout: str) -> Array:
    bits = _BITS.get(dtype)
    if bits is None:
        digits = re.match(r"[a-z]+(\d+)", dtype)
        bits = int(digits[1]) if digits else 0
    packed, space = re.search(r"E\((\d+)\)", layout), re.search(r"S\((\d+)\)", layout)
    tile = re.search(r"T\(([^)]*)\)", layout)
    if packed:
        bits = int(packed[1])
    elif bits < 8 and dtype not in ("token", "opaque"):
        bits = 8  # small integers take a byte unless their layout packs them
    return Array(
        dtype,
        tuple(int(size.strip("<=? ")) for size in dims.split(",") if size),
        tuple(int(axis) for axis in minor.split(",") if axis),
        tuple(1 if size == "*" else int(size) for size in tile[1].split(",") if size) if tile else (),
        int(space[1]) if space else DEVICE,
        bits,
    )


def _array(found: re.Match) -> Array:
    return _typed(found["dtype"], found["dims"], found["minor"] or "", found["layout"] or "")


def _closing(text: str) -> int:
    """Where the bracket closes that was open before this text."""
    depth, quoted, place = 1, False, 0
    while place < len(text):
        letter = text[place]
        if quoted:
            if letter == "\\":
                place += 1
            elif letter == '"':
                quoted = False
        elif letter == '"':
            quoted = True
        elif letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                return place
        place += 1
    raise ValueError(f"A bracket does not close: {text[:80]!r}.")
