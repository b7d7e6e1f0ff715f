"""Llama 3 8B by DoRA on all linear layers: 16 chips of v5e."""

from experiments.pods import pod_config
from experiments.training.mesh_sizes import MeshSizes

DEFAULTS = pod_config(
    "llama3-8b-dora", "meta-llama/Meta-Llama-3-8B-Instruct", MeshSizes(fsdp=16), batch=64, lr=2e-4, method="dora"
)
