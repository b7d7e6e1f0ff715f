"""Mixtral 8x7B by LoRA on attention and experts: 16 chips of v5e."""

from experiments.pods import pod_config
from experiments.training.mesh_sizes import MeshSizes

DEFAULTS = pod_config(
    "mixtral-8x7b-lora",
    "mistralai/Mixtral-8x7B-Instruct-v0.1",
    MeshSizes(fsdp=8, tensor=2, sequence=True),
    batch=32,
)
