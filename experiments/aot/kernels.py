"""The floating-point operations of custom calls."""

import math
import re

from experiments.aot.hlo import Computation, Instruction

# Targets that move, allocate or synchronize without computing products.
_NO_PRODUCTS = re.compile(
    r"^(AllocateBuffer|AssumeGatherIndicesInBound|Async\w+|ConcatBitcast|Sharding|SPMD\w+|MoveTo\w+|PinnedTo\w+|"
    r"annotate_device_placement|X64\w+|TopK|ProduceTrashBuffer|xla_ffi_python_cpu_callback|SliceToDynamic|PadToStatic)$"
)
# XLA's kernel that computes the offsets of the groups of a ragged product.
_METADATA = "ragged-dot-metadata"
# The number of products of queries × keys × width in each splash attention kernel: scores and output in the forward
# pass; scores, dV, dP and dK for keys and values; scores, dP and dQ for queries.
_SPLASH = {"splash_mha_fwd": 2, "splash_mqa_fwd": 2, "splash_mha_dkv": 4, "splash_mqa_dkv": 4}
_SPLASH |= {"splash_mha_dq": 3, "splash_mqa_dq": 3}


def kernel_flops(computation: Computation, instruction: Instruction) -> tuple[float, str | None]:
    """Returns the floating-point operations of a custom call, and its name if they are unknown.

    The cost estimate of a kernel is used if it has one, as XLA's ragged products have. JAX's splash attention has none,
    so its products are counted from the shapes of its operands, for the blocks of a causal mask with full diagonal
    blocks. Masks within these blocks, such as segments, do not make the kernel faster.

    Args:
      computation: The computation that contains the call.
      instruction: The call.
    """
    target = instruction.value("custom_call_target") or instruction.name
    estimate = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', instruction.attributes)
    if estimate:
        return float(estimate[1]), None
    if _NO_PRODUCTS.match(target) or instruction.name.startswith(_METADATA):
        return 0.0, None
    for name, products in _SPLASH.items():
        if re.search(rf"\b{name}", instruction.attributes) or instruction.name.startswith(name):
            return products * _splash_product(computation, instruction), None
    name = re.search(r'op_name="([^"]*)"', instruction.attributes)
    return 0.0, f"{target} {name[1].rsplit('/', 2)[-2] if name and '/' in name[1] else instruction.name}"


def _splash_product(computation: Computation, instruction: Instruction) -> float:
    """Returns the operations of one product of splash attention over the blocks of its mask."""
    arrays = [computation.instructions[name].shape for name in instruction.operands]
    blocks = [array.dims for array in arrays if array.dtype == "s8" and len(array.dims) == 3]
    floats = [array.dims for array in arrays if array.dtype in ("bf16", "f32", "f16")]
    (*batch, heads, queries, width), (*_, keys, _) = floats[0], floats[1]
    share = 1.0
    if blocks:
        rows, columns = blocks[0][-2:]
        visible = sum(min(row + 1, columns) for row in range(rows))
        share = visible / (rows * max(rows, columns))
    return 2.0 * math.prod(batch) * heads * queries * keys * width * share
