"""Names in checkpoint files that transformers changes when it loads them: adapters have the running model's names."""

import re
from collections.abc import Iterator

_LLAVA = (
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^language_model\.model\.", "model.language_model."),
    (r"^(vision_tower|multi_modal_projector|audio_tower|image_newline)\b", r"model.\1"),
)
_RULES = (
    _LLAVA,
    (*_LLAVA, (r"^model\.vision_tower\.vision_model\.", "model.vision_tower.")),
    (  # Qwen 2 VL
        (r"^visual\.", "model.visual."),
        (r"^model\.(?!language_model|visual)", "model.language_model."),
    ),
    (  # ViT
        (r"\bencoder\.layer\.", "layers."),
        (r"\battention\.query\b", "q_proj"),
        (r"\battention\.key\b", "k_proj"),
        (r"\battention\.value\b", "v_proj"),
        (r"\battention\.output\.dense\b", "attention.o_proj"),
        (r"\bintermediate\.dense\b", "mlp.fc1"),
        (r"\boutput\.dense\b", "mlp.fc2"),
    ),
    ((r"\.block_sparse_moe\.", ".mlp."),),  # Mixtral
)
"""The changes of each model, in the order in which they apply. Read from transformers 5.24."""


def model_names(name: str) -> Iterator[str]:
    """Yields the names that a tensor of a checkpoint may have in the running model, except its own.

    Example:
      >>> list(model_names("model.layers.0.block_sparse_moe.gate.weight"))[-1]
      'model.layers.0.mlp.gate.weight'
    """
    for rules in _RULES:
        renamed = name
        for pattern, replacement in rules:
            renamed = re.sub(pattern, replacement, renamed)
        if renamed != name:
            yield renamed
