"""Files that are replaced atomically, errors of damaged files, arrays of Orbax checkpoints, and termination signals."""

from lora_jax.io.arrays import open_arrays, read_arrays
from lora_jax.io.files import create_parents, join_names, replace_directory, replace_file
from lora_jax.io.read_errors import describe_error, is_read_error, printable, reading, shorten, silence_logs
from lora_jax.io.signals import raise_on_signal

__all__ = [
    "create_parents",
    "describe_error",
    "is_read_error",
    "join_names",
    "open_arrays",
    "printable",
    "raise_on_signal",
    "read_arrays",
    "reading",
    "replace_directory",
    "replace_file",
    "shorten",
    "silence_logs",
]
