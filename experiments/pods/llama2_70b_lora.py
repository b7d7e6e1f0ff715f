"""Llama 2 70B by LoRA on all linear layers: 32 chips of v5p."""

from experiments.pods import pod_config
from experiments.training.mesh_sizes import MeshSizes

DEFAULTS = pod_config("llama2-70b-lora", "meta-llama/Llama-2-70b-chat-hf", MeshSizes(fsdp=32), batch=32, remat="dots")
