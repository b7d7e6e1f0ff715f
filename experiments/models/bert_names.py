"""The names of the weights of BERT, RoBERTa, ELECTRA and DistilBERT in checkpoints."""

from lora_jax.peft import LINEAR, Names, Weight

_PART = "{part=query|key|value}"
_LAYER = "encoder/layers/{layer}"


def _embeddings(prefix: str, tables: str) -> tuple[Weight, ...]:
    path, name = f"embeddings/{{table={tables}}}/embedding", prefix + "embeddings.{table}_embeddings.weight"
    return (
        Weight(path, name, module="embedding"),
        Weight("embeddings/norm/scale", f"{prefix}embeddings.LayerNorm.weight"),
        Weight("embeddings/norm/bias", f"{prefix}embeddings.LayerNorm.bias"),
    )


def encoder_names(prefix: str, *, segments: bool = True, projected: bool = False) -> Names:
    """Returns the names of the weights of an encoder of BERT's form.

    Args:
      prefix: The prefix of all names, which a bare encoder's checkpoint lacks.
      segments: Whether the encoder has segment embeddings.
      projected: Whether a linear layer projects the embeddings.
    """
    layer = prefix + "encoder.layer.{layer}"
    projection = (
        Weight("projection/kernel", f"{prefix}embeddings_project.weight", LINEAR),
        Weight("projection/bias", f"{prefix}embeddings_project.bias"),
    )
    return Names(
        (
            *_embeddings(prefix, "word|position|token_type" if segments else "word|position"),
            *(projection if projected else ()),
            Weight(f"{_LAYER}/attention/output/kernel", f"{layer}.attention.output.dense.weight", LINEAR),
            Weight(f"{_LAYER}/attention/output/bias", f"{layer}.attention.output.dense.bias"),
            Weight(f"{_LAYER}/attention/{_PART}/kernel", layer + ".attention.self.{part}.weight", LINEAR),
            Weight(f"{_LAYER}/attention/{_PART}/bias", layer + ".attention.self.{part}.bias"),
            Weight(f"{_LAYER}/attention_norm/scale", f"{layer}.attention.output.LayerNorm.weight"),
            Weight(f"{_LAYER}/attention_norm/bias", f"{layer}.attention.output.LayerNorm.bias"),
            Weight(f"{_LAYER}/feed_forward/up/kernel", f"{layer}.intermediate.dense.weight", LINEAR),
            Weight(f"{_LAYER}/feed_forward/up/bias", f"{layer}.intermediate.dense.bias"),
            Weight(f"{_LAYER}/feed_forward/down/kernel", f"{layer}.output.dense.weight", LINEAR),
            Weight(f"{_LAYER}/feed_forward/down/bias", f"{layer}.output.dense.bias"),
            Weight(f"{_LAYER}/feed_forward_norm/scale", f"{layer}.output.LayerNorm.weight"),
            Weight(f"{_LAYER}/feed_forward_norm/bias", f"{layer}.output.LayerNorm.bias"),
        ),
        prefix=prefix,
    )


def _distilbert_names() -> Names:
    prefix = "distilbert."
    layer = prefix + "transformer.layer.{layer}"
    linear = {
        "attention/query": "attention.q_lin",
        "attention/key": "attention.k_lin",
        "attention/value": "attention.v_lin",
        "attention/output": "attention.out_lin",
        "feed_forward/up": "ffn.lin1",
        "feed_forward/down": "ffn.lin2",
    }
    norms = {"attention_norm": "sa_layer_norm", "feed_forward_norm": "output_layer_norm"}
    rows = [*_embeddings(prefix, "word|position")]
    for part, name in linear.items():
        rows.append(Weight(f"{_LAYER}/{part}/kernel", f"{layer}.{name}.weight", LINEAR))
        rows.append(Weight(f"{_LAYER}/{part}/bias", f"{layer}.{name}.bias"))
    for part, name in norms.items():
        rows.append(Weight(f"{_LAYER}/{part}/scale", f"{layer}.{name}.weight"))
        rows.append(Weight(f"{_LAYER}/{part}/bias", f"{layer}.{name}.bias"))
    return Names(tuple(rows), prefix=prefix)


NAMES = encoder_names("bert.")
ROBERTA_NAMES = encoder_names("roberta.")
DISTILBERT_NAMES = _distilbert_names()
# The first checkpoints name the scale and bias of a norm gamma and beta.
SPELLINGS = ((r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
UNUSED = (
    r"position_ids$|^pooler\.|^cls\.|^lm_head\.|^(pre_)?classifier\.|^qa_outputs\."
    r"|^vocab_(transform|layer_norm|projector)\.|^(discriminator|generator)_predictions\.|^generator_lm_head\."
)
