"""Published specifications of accelerators.

Sources, read in 2026:
  TPUs: `v4 <https://cloud.google.com/tpu/docs/v4>`_, `v5e <https://cloud.google.com/tpu/docs/v5e>`_,
  `v5p <https://cloud.google.com/tpu/docs/v5p>`_, `v6e <https://cloud.google.com/tpu/docs/v6e>`_. A link's bandwidth is
  the chip's interconnect bandwidth in one direction divided by its ports: v5e 1600 Gbit/s by 4, v6e 3200 Gbit/s by 4,
  v5p 4800 Gbit/s by 6; v4's 50 GB/s is from Jouppi et al., `TPU v4 <https://arxiv.org/abs/2304.01433>`_, 2023, table 4.
  Bytes for programs are those that libtpu's compiler reports as available; the rest of a chip's memory is reserved.
  GPUs: NVIDIA's data sheets of the A100 (80 GB SXM), the H100 (SXM and PCIe) and the H200 (SXM): dense, without
  sparsity; NVLink in one direction.
"""

import dataclasses

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """An accelerator, as JAX sees one device.

    Attributes:
      name: The name in topologies.
      kinds: The values of `jax.Device.device_kind`.
      flops: Peak operations per second in bfloat16.
      memory: Bytes of memory that are available to programs.
      bandwidth: Bytes per second between memory and cores.
      link: Bytes per second that one link sends; for GPUs, all links together.
      axes: The number of axes of the torus of links; 0 is a switch.
    """

    name: str
    kinds: tuple[str, ...]
    flops: float
    memory: int
    bandwidth: float
    link: float
    axes: int = 0

    @property
    def links(self) -> int:
        """The number of links to other chips: two per axis of the torus."""
        return max(2 * self.axes, 1)


TPUS = (
    Chip("v4", ("TPU v4",), 275e12, int(30.75 * GIB), 1200e9, 50e9, axes=3),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), 197e12, int(15.75 * GIB), 819e9, 50e9, axes=2),
    Chip("v5p", ("TPU v5", "TPU v5p"), 459e12, int(95.74 * GIB), 2765e9, 100e9, axes=3),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), 918e12, int(31.25 * GIB), 1600e9, 100e9, axes=2),
)
GPUS = (
    Chip("a100", ("NVIDIA A100-SXM4-80GB",), 312e12, 80 * 10**9, 2039e9, 300e9),
    Chip("a100-40gb", ("NVIDIA A100-SXM4-40GB",), 312e12, 40 * 10**9, 1555e9, 300e9),
    Chip("h100-pcie", ("NVIDIA H100 PCIe",), 756e12, 80 * 10**9, 2000e9, 300e9),
    Chip("h100", ("NVIDIA H100 80GB HBM3", "NVIDIA H100"), 989e12, 80 * 10**9, 3350e9, 450e9),
    Chip("h200", ("NVIDIA H200",), 989e12, 141 * 10**9, 4800e9, 450e9),
)
CHIPS = (*TPUS, *GPUS)


def find_chip(device_kind: str) -> Chip | None:
    """Returns the chip of a `device_kind`; None if it is unknown, such as a CPU.

    Example:
      >>> find_chip("TPU v5 lite").name
      'v5e'
    """
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)


def find_tpu(name: str) -> Chip | None:
    """Returns the TPU of a topology's name; None if it is unknown."""
    return next((chip for chip in TPUS if chip.name == name), None)
