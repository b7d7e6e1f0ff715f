"""Parses the optimized HLO that XLA prints into computations of instructions."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

DEVICE, HOST = 0, 5
"""Memory spaces in layouts: the device's memory (HBM) and the host's; others are on-chip memory."""

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
      dtype: XLA's name of the dtype.
      dims: The sizes of the axes.
      minor_to_major: The order of the axes in memory, the fastest first.
      tile: The first level of tiling; the last axes in memory are padded to its multiples.
      space: The memory space.
      bits: The number of bits of an element in memory.
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
        """The number of bytes without padding."""
        return -(-self.elements * self.bits // 8)

    @property
    def padded(self) -> int:
        """The number of bytes in memory, including the padding of tiles."""
        sizes = [self.dims[axis] for axis in reversed(self.minor_to_major)] or list(self.dims)
        tile = self.tile[-len(sizes) :] if sizes else ()
        for index, multiple in enumerate(reversed(tile), start=1):
            sizes[-index] = -(-sizes[-index] // multiple) * multiple
        return -(-math.prod(sizes) * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One operation.

    Attributes:
      name: The name, unique in the module.
      shapes: The arrays of its result; nested tuples are flattened.
      nested: The number of arrays in each element of a tuple; empty if the result is not a tuple.
      opcode: The operation.
      operands: The names of operands; empty for constants and parameters.
      inside: The text in the parentheses.
      attributes: The text after the parentheses.
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
        """The type of a result that is one array."""
        return self.shapes[0]

    def called(self, role: str) -> str | None:
        """Returns the computation that an attribute (`body`, `calls`, `to_apply` …) names; None without it."""
        match = re.search(rf"(?<!\w){role}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None

    def branches(self) -> list[str]:
        """Returns the computations of a conditional."""
        match = re.search(r"branch_computations=\{([^}]*)\}", self.attributes)
        if match:
            return [name.strip().lstrip("%") for name in match[1].split(",")]
        return [name for role in ("true_computation", "false_computation") if (name := self.called(role))]

    def axes(self, attribute: str) -> tuple[int, ...]:
        """Returns the numbers of an attribute such as `lhs_contracting_dims={1,2}`."""
        match = re.search(rf"(?<!\w){attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(axis) for axis in match[1].split(",") if axis) if match else ()

    def value(self, attribute: str) -> str | None:
        """Returns the value of an attribute such as `direction=LT` or `custom_call_target="…"`; None without it."""
        match = re.search(rf'(?<!\w){attribute}="?([^",\s]+)', self.attributes)
        return match[1] if match else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A function of the module: its instructions by name, in order of execution."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.instructions.values())

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        """The parameters by number."""
        return {int(instruction.inside): instruction for instruction in self if instruction.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """The instructions that have an instruction as an operand, by its name."""
        users: dict[str, list[Instruction]] = {name: [] for name in self.instructions}
        for instruction in self:
            for name in dict.fromkeys(instruction.operands):
                users[name].append(instruction)
        return users

    def operand(self, instruction: Instruction, number: int = 0) -> Instruction:
        return self.instructions[instruction.operands[number]]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Attributes:
      computations: The computations by name.
      entry: The computation that runs.
      partitions: The number of devices, each of which runs its partition.
    """

    computations: dict[str, Computation]
    entry: Computation
    partitions: int


def parse(text: str) -> Module:
    """Parses the text of `jax.stages.Compiled.as_text()`.

    Args:
      text: The optimized HLO of a module.

    Raises:
      ValueError: The text is not HLO, or an instruction has an unknown form.
    """
    computations, entry, name, is_entry = {}, None, None, False
    pending: list[str] = []
    for line in text.splitlines():
        if name is None:
            head = _HEAD.match(line)
            if head:
                is_entry, name, pending = bool(head[1]), head[2], []
        elif line == "}":
            parsed = _computation(name, pending)
            computations[name] = parsed
            entry, name = parsed if is_entry else entry, None
        elif _INSTRUCTION.match(line):
            pending.append(line)
        else:  # a string with line breaks, as in the metadata of kernels
            pending[-1] += line
    if entry is None:
        raise ValueError(f"Not an HLO module, since it has no ENTRY. It begins with {text[:60]!r}.")
    partitions = re.search(r"num_partitions=(\d+)", text.split("\n", 1)[0])
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _computation(name: str, lines: list[str]) -> Computation:
    instructions, root = {}, None
    for line in lines:
        instruction = _instruction(line)
        instructions[instruction.name] = instruction
        if line.lstrip().startswith("ROOT "):
            root = instruction
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
    """Parses the type at the beginning of a text: its arrays, the number per element of a tuple, and the rest."""
    if not text.startswith("("):
        match = _TOKEN.match(text)
        if match is None:
            raise ValueError(f"Expected an HLO type: {text[:80]!r}.")
        return (_array(match),), (), text[match.end() :]
    end = _closing(text[1:]) + 1
    inner, arrays, nested = _COMMENT.sub("", text[1:end]).strip(), [], []
    while inner:
        parsed, _, inner = _shape(inner)
        arrays += parsed
        nested.append(len(parsed))
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
        bits = 8  # small integers take a byte unless packed
    return Array(
        dtype,
        tuple(int(size.strip("<=? ")) for size in dims.split(",") if size),
        tuple(int(axis) for axis in minor.split(",") if axis),
        tuple(1 if size == "*" else int(size) for size in tile[1].split(",") if size) if tile else (),
        int(space[1]) if space else DEVICE,
        bits,
    )


def _array(match: re.Match) -> Array:
    return _typed(match["dtype"], match["dims"], match["minor"] or "", match["layout"] or "")


def _closing(text: str) -> int:
    """Returns the index of the parenthesis that closes the one before this text."""
    depth, quoted, index = 1, False, 0
    while index < len(text):
        letter = text[index]
        if quoted:
            if letter == "\\":
                index += 1
            elif letter == '"':
                quoted = False
        elif letter == '"':
            quoted = True
        elif letter == "(":
            depth += 1
        elif letter == ")":
            depth -= 1
            if depth == 0:
                return index
        index += 1
    raise ValueError(f"Unbalanced parentheses: {text[:80]!r}.")
