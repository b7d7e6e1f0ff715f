"""The names of the weights of BERT, RoBERTa, ELECTRA and DistilBERT in checkpoints."""

from lora_jax.peft import LINEAR, Names, Weight

_LAYER = "encoder/layers/{layer}"


def embedding_weights(prefix: str, tables: str) -> tuple[Weight, ...]:
    """Returns the names of the embeddings of an encoder, whose tables are separated by `|`."""
    path, name = f"embeddings/{{table={tables}}}/embedding", prefix + "embeddings.{table}_embeddings.weight"
    return (
        Weight(path, name, module="embedding"),
        Weight("embeddings/norm/scale", f"{prefix}embeddings.LayerNorm.weight"),
        Weight("embeddings/norm/bias", f"{prefix}embeddings.LayerNorm.bias"),
    )


def layer_weights(layer: str, linears: dict[str, str], norms: dict[str, str]) -> tuple[Weight, ...]:
    """Returns the names of the weights of an encoder's layers.

    Args:
      layer: The name of a layer, with the placeholder `{layer}`.
      linears: The names of linear layers within a layer, by their paths within a layer.
      norms: The names of normalizations, likewise.
    """
    return (
        *(Weight(f"{_LAYER}/{path}/kernel", f"{layer}.{name}.weight", LINEAR) for path, name in linears.items()),
        *(Weight(f"{_LAYER}/{path}/bias", f"{layer}.{name}.bias") for path, name in (linears | norms).items()),
        *(Weight(f"{_LAYER}/{path}/scale", f"{layer}.{name}.weight") for path, name in norms.items()),
    )


LINEARS = {
    "attention/output": "attention.output.dense",
    "feed_forward/up": "intermediate.dense",
    "feed_forward/down": "output.dense",
}
"""The names of BERT's linear layers within a layer, except attention's projections."""

NORMS = {"attention_norm": "attention.output.LayerNorm", "feed_forward_norm": "output.LayerNorm"}
"""The names of BERT's normalizations within a layer."""


def encoder_names(prefix: str, *, segments: bool = True, projected: bool = False) -> Names:
    """Returns the names of the weights of an encoder of BERT's form.

    Args:
      prefix: The prefix of all names, which a bare encoder's checkpoint lacks.
      segments: Whether the encoder has segment embeddings.
      projected: Whether a linear layer projects the embeddings.
    """
    projection = (
        Weight("projection/kernel", f"{prefix}embeddings_project.weight", LINEAR),
        Weight("projection/bias", f"{prefix}embeddings_project.bias"),
    )
    linears = {"attention/{part=query|key|value}": "attention.self.{part}", **LINEARS}
    return Names(
        (
            *embedding_weights(prefix, "word|position|token_type" if segments else "word|position"),
            *(projection if projected else ()),
            *layer_weights(prefix + "encoder.layer.{layer}", linears, NORMS),
        ),
        prefix=prefix,
    )


def _distilbert_names() -> Names:
    prefix = "distilbert."
    linears = {
        "attention/query": "attention.q_lin",
        "attention/key": "attention.k_lin",
        "attention/value": "attention.v_lin",
        "attention/output": "attention.out_lin",
        "feed_forward/up": "ffn.lin1",
        "feed_forward/down": "ffn.lin2",
    }
    norms = {"attention_norm": "sa_layer_norm", "feed_forward_norm": "output_layer_norm"}
    layers = layer_weights(prefix + "transformer.layer.{layer}", linears, norms)
    return Names((*embedding_weights(prefix, "word|position"), *layers), prefix=prefix)


NAMES = encoder_names("bert.")
ROBERTA_NAMES = encoder_names("roberta.")
DISTILBERT_NAMES = _distilbert_names()
# The first checkpoints name the scale and bias of a norm gamma and beta.
SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
UNUSED = (
    r"position_ids$|^pooler\.|^cls\.|^lm_head\.|^(pre_)?classifier\.|^qa_outputs\."
    r"|^vocab_(transform|layer_norm|projector)\.|^(discriminator|generator)_predictions\.|^generator_lm_head\."
)
