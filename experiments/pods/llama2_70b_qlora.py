"""Llama 2 70B in NF4 by LoRA on all linear layers (QLoRA): 64 chips of v5e."""

from experiments.pods import pod_config
from experiments.training.mesh_sizes import MeshSizes

DEFAULTS = pod_config(
    "llama2-70b-qlora", "meta-llama/Llama-2-70b-chat-hf", MeshSizes(fsdp=64), batch=64, quantize="nf4"
)
