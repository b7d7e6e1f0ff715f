"""Floating-point operations of what a compiled program calls that is no HLO."""

import math
import re

from experiments.aot.hlo import Computation, Instruction

# Targets that move, allocate, synchronize or promise, and compute nothing.
_NO_PRODUCTS = re.compile(
    r"^(AllocateBuffer|AssumeGatherIndicesInBound|Async\w+|ConcatBitcast|Sharding|SPMD\w+|MoveTo\w+|PinnedTo\w+|"
    r"annotate_device_placement|X64\w+|TopK|ProduceTrashBuffer|xla_ffi_python_cpu_callback|SliceToDynamic|PadToStatic)$"
)
# A kernel of XLA's own that finds where the groups of a ragged product begin.
_METADATA = "ragged-dot-metadata"
# Products of queries × keys × width in each of splash attention's kernels: forward scores and mix; for keys and
# values the scores again, dV, dP, dK; for queries the scores again, dP, dQ.
_SPLASH = {"splash_mha_fwd": 2, "splash_mqa_fwd": 2, "splash_mha_dkv": 4, "splash_mqa_dkv": 4}
_SPLASH |= {"splash_mha_dq": 3, "splash_mqa_dq": 3}


def kernel_flops(where: Computation, one: Instruction) -> tuple[float, str | None]:
    """What a custom call computes.

    Args:
      where: The computation that it is in.
      one: The call.

    Returns:
      Its floating-point operations, and its name where they are not known. A kernel's own estimate of its cost is
      taken where it has one, as those of XLA's ragged products have. JAX's splash attention has none: its products are
      counted by the shapes of its operands, for the blocks of a causal mask, those on the diagonal whole. A mask that
      sees less within those blocks, of segments for one, makes the kernel no faster.
    """
    target = one.value("custom_call_target") or one.name
    estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', one.attributes)
    if estimate:
        return float(estimate[1]), None
    if _NO_PRODUCTS.match(target) or one.name.startswith(_METADATA):
        return 0.0, None
    for name, products in _SPLASH.items():
        if re.search(rf"\b{name}", one.attributes) or one.name.startswith(name):
            return products * _splash_product(where, one), None
    name = re.search(r'op_name="([^"]*)"', one.attributes)
    return 0.0, f"{target} {name[1].rsplit('/', 2)[-2] if name and '/' in name[1] else one.name}"


def _splash_product(where: Computation, one: Instruction) -> float:
    """Operations of one product of splash attention over all blocks that its mask runs."""
    arrays = [where.instructions[name].shape for name in one.operands]
    blocks = [array.dims for array in arrays if array.dtype == "s8" and len(array.dims) == 3]
    floats = [array.dims for array in arrays if array.dtype in ("bf16", "f32", "f16")]
    (*batch, heads, queries, width), (*_, keys, _) = floats[0], floats[1]
    share = 1.0
    if blocks:
        rows, columns = blocks[0][-2:]
        seen = sum(min(row + 1, columns) for row in range(rows))
        share = seen / (rows * max(rows, columns))
    return 2.0 * math.prod(batch) * heads * queries * keys * width * share
