"""Mixtral 8x7B in NF4 by LoRA on attention and experts (QLoRA): 8 chips of v5e."""

from experiments.pods import pod_config
from experiments.training.mesh_sizes import MeshSizes

DEFAULTS = pod_config(
    "mixtral-8x7b-qlora",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    MeshSizes(fsdp=4, tensor=2, sequence=True),
    batch=16,
    quantize="nf4",
)
