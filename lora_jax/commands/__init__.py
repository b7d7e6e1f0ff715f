"""The commands of the command line: inspect, merge, convert and compare adapters on disk; check the installation."""

from lora_jax.commands.checkup import doctor
from lora_jax.commands.comparison import diff
from lora_jax.commands.conversion import convert
from lora_jax.commands.inspection import inspect
from lora_jax.commands.merging import merge
from lora_jax.renamed import module_getattr

__all__ = ["convert", "diff", "doctor", "inspect", "merge"]

__getattr__ = module_getattr(__name__)
