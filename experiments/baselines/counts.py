"""Counts the trained parameters that the LoRA, DoRA and QLoRA papers print, on models of their shapes.

    python -m experiments.baselines.counts

prints the exact count and the paper's figure for each configuration, and the reason if they differ. Models and deltas
are shapes without arrays. A new method is a row, or a function that returns some, in `ROWS`.

References:
  Hu et al., `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, Tables 2-4 and 15
  Liu et al., `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024, Tables 1, 5 and 6
  Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, whose adapters of all linear layers have r = 64
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from rich import box
from rich.console import Console
from rich.table import Table

import lora_jax as lora
from experiments.baselines import prefix_layer_tuning, prompt_tuning, specs
from experiments.models import bert, deberta, gpt2, heads, llama
from experiments.models.options import Options
from experiments.models.rope import Rope


def _roberta(width: int, layers: int, attention_heads: int) -> Any:
    shape = bert.BertConfig(
        50265, width, layers, attention_heads, 4 * width, 514, 1, pad_token_id=1, model_type="roberta"
    )
    return functools.partial(_classifier, bert.Bert, shape)


def _deberta_xxl() -> Any:
    # Without the convolution beside the first layer, which none of the rows trains and stacked layers do not have.
    sizes = {"share_att_key": True, "pos_att_type": ("p2c", "c2p"), "position_buckets": 256}
    shape = deberta.DebertaConfig(
        128100, 1536, 48, 24, 6144, 512, position_biased_input=False, norm_rel_ebd="layer_norm", **sizes
    )
    return functools.partial(_classifier, deberta.Deberta, shape)


def _classifier(encoder: Callable, shape: Any, options: Options, rngs: nnx.Rngs) -> nnx.Module:
    return heads.SequenceClassifier(encoder(shape, options, rngs=rngs), shape, 3, options, rngs=rngs)


def _gpt(width: int, layers: int, attention_heads: int, positions: int = 1024, *, tied: bool = True) -> Any:
    shape = gpt2.Gpt2Config(50257, positions, width, layers, attention_heads, tie_word_embeddings=tied)
    return lambda options, rngs: gpt2.Gpt2(shape, options, rngs=rngs)


def _llama(width: int, hidden: int, layers: int, attention_heads: int, groups: int = 0, vocabulary: int = 32000) -> Any:
    head = width // attention_heads
    groups = groups or attention_heads
    shape = llama.LlamaConfig(
        vocabulary, width, hidden, layers, attention_heads, groups, head, Rope((1.0,) * (head // 2)), (False,) * layers
    )
    return lambda options, rngs: llama.Llama(shape, options, rngs=rngs)


MODELS: dict[str, Callable[[Options, nnx.Rngs], nnx.Module]] = {
    "RoBERTa-base": _roberta(768, 12, 12),
    "RoBERTa-large": _roberta(1024, 24, 16),
    "DeBERTa-XXL": _deberta_xxl(),
    "GPT-2 M": _gpt(1024, 24, 16),
    "GPT-2 L": _gpt(1280, 36, 20),
    "GPT-3": _gpt(12288, 96, 96, 2048),
    "GPT-3 untied": _gpt(12288, 96, 96, 2048, tied=False),
    "LLaMA-7B": _llama(4096, 11008, 32, 32),
    "LLaMA-13B": _llama(5120, 13824, 40, 40),
    "LLaMA-33B": _llama(6656, 17920, 60, 52),
    "LLaMA-65B": _llama(8192, 22016, 80, 64),
    "LLaMA3-8B": _llama(4096, 14336, 32, 32, 8, 128256),
}
"""The models by name: builds one with random weights."""


@functools.cache
def shapes(model: str, *, scan: bool = True) -> Any:
    """Returns the parameters of a model, and of virtual tokens, as shapes.

    Args:
      model: The name.
      scan: Whether layers are stacked, which is faster.
    """
    module = nnx.eval_shape(lambda: MODELS[model](Options(scan=scan), nnx.Rngs(0)))
    return lora.nnx.functional(module)[1]


def size(tree: Any) -> int:
    """Returns the number of elements of the leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@dataclass(frozen=True)
class Row:
    """A configuration and what a paper prints for it.

    Attributes:
      method: The method and its sizes.
      model: A name in `MODELS`.
      spec: Returns the spec for the model's parameters.
      printed: The paper's figure, such as '0.3M' (millions) or '.83%' (of the model with its adapter); empty if the
        paper prints none.
      reason: Why the figure differs from the exact count.
      virtual: The number of virtual tokens by their form: 'prompt' or 'layer_inputs'.
      scan: Whether the spec fits stacked layers.
    """

    method: str
    model: str
    spec: Callable[[Any], Any]
    printed: str = ""
    reason: str = ""
    virtual: tuple[tuple[str, int], ...] = ()
    scan: bool = True

    @property
    def count(self) -> int:
        """The exact number of trained parameters."""

        def train(key: jax.Array, base: Any) -> Any:
            return lora.partition(lora.init(key, base, self.spec(base)))[0]

        base = shapes(self.model, scan=self.scan)
        if self.virtual:
            layers, _, width = base["layers"]["attention"]["output"]["kernel"].shape
            sizes = {prompt_tuning.NAME: (width,), prefix_layer_tuning.NAME: (layers, width)}
            added = {name: (*sizes[name][:-1], length, sizes[name][-1]) for name, length in self.virtual}
            base = base | {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in added.items()}
        return size(jax.eval_shape(train, jax.random.key(0), base))

    @property
    def agrees(self) -> bool:
        """Whether the paper's figure is the exact count, rounded or truncated to the digits that it has."""
        if not self.printed:
            return True
        digits = len(self.printed.rstrip("M%").partition(".")[2])
        share = self.count / (size(shapes(self.model)) + self.count)
        exact = (1e-6 * self.count if self.printed.endswith("M") else 100 * share) * 10**digits
        figure = round(float(self.printed.rstrip("M%").replace(",", "")) * 10**digits)
        return figure in (math.floor(exact), round(exact))


def _lora(pattern: str, rank: int, recipe: Callable = lora.LoRA, **options: Any) -> dict[str, lora.Recipe]:
    return {rf"({pattern})/kernel$": recipe(rank, axes=("batch", "in", "out"), **options)}


def _gpt_lora(rank: int, weights: str = "qv") -> dict[str, lora.Recipe]:
    """Returns the spec of LoRA on some of q, k, v (parts of one kernel) and o."""
    spec = _lora("attention/qkv", rank, blocks=tuple(part in weights for part in "qkv"))
    return spec | (_lora("attention/output", rank) if "o" in weights else {})


def _bottleneck(size: int, pattern: str, *, norm: bool = False) -> Callable[[Any], dict[str, lora.Recipe]]:
    recipe = lora.Bottleneck(size, "relu", norm=norm, axes=("batch", "in", "out"))
    return lambda _: {rf"({pattern})/kernel$": recipe}


_HOULSBY, _LATE = "attention/output|feed_forward/down", "feed_forward/down"
"""After attention's output and the feed-forward's; after the latter only (Lin, with a normalization, and Pfeiffer)."""


def _adapter_drop(size: int, layers: range) -> Callable[[Any], dict[str, lora.Recipe]]:
    """Returns the spec of Pfeiffer adapters in some of the layers, which are not stacked."""
    pattern = rf"layers/({'|'.join(map(str, layers))})/{_LATE}/kernel$"
    return lambda _: {pattern: lora.Bottleneck(size, axes=("in", "out"))}


def _virtual(*names: str) -> dict[str, lora.Recipe]:
    return {f"^({'|'.join(names)})$": lora.Full()}


def _gpt3_rows() -> list[Row]:
    """The rows of Tables 4 and 15 of the LoRA paper."""
    sizes = (
        ("v", 2, "4.7M"),
        ("qv", 1, "4.7M"),
        ("qv", 2, "9.4M"),
        ("qkvo", 1, "9.4M"),
        ("q", 8, "18.8M"),
        ("qv", 4, "18.8M"),
        ("qkvo", 2, "18.8M"),
        ("qv", 8, "37.7M"),
        ("qkvo", 4, "37.7M"),
        ("qv", 64, "301.9M"),
        ("qkvo", 64, "603.8M"),
    )
    rows = []
    for weights, rank, printed in sizes:
        reason = "twice the truncated 301.9M" if printed == "603.8M" else ""
        spec = _gpt_lora(rank, weights)
        rows.append(Row(f"LoRA r_{weights}={rank}", "GPT-3", lambda _, spec=spec: spec, printed, reason))
    for bottleneck, printed in ((1, "7.1M"), (4, "21.2M"), (8, "40.1M"), (16, "77.9M"), (64, "304.4M")):
        rows.append(Row(f"Houlsby r={bottleneck}", "GPT-3", _bottleneck(bottleneck, _HOULSBY), printed))
    for length, printed in ((40, "0.4M"), (72, "0.9M"), (136, "1.7M"), (264, "3.2M"), (520, "6.4M")):
        virtual = ((prompt_tuning.NAME, length),)
        rows.append(Row(f"PreEmbed l={length}", "GPT-3", lambda _: _virtual("prompt"), printed, virtual=virtual))
    above = "the paper prints 0.8 to 8 % more than its formula, layers · width · tokens"
    for length, printed in ((4, "5.1M"), (8, "10.1M"), (16, "20.2M"), (36, "44.1M"), (64, "76.1M")):
        virtual = ((prefix_layer_tuning.NAME, length),)
        rows.append(Row(f"PreLayer l={length}", "GPT-3", lambda _: _virtual("layer_inputs"), printed, above, virtual))
    for rank, printed in ((8, "37.8M"), (32, "151.1M"), (64, "302.1M")):
        virtual = ((prompt_tuning.NAME, 12),)
        spec = _gpt_lora(rank) | _virtual("prompt")
        rows.append(
            Row(f"LoRA r_qv={rank} + PreEmbed l=12", "GPT-3", lambda _, spec=spec: spec, printed, virtual=virtual)
        )
    virtual = ((prefix_layer_tuning.NAME, 12),)
    both = _gpt_lora(8) | _virtual("layer_inputs")
    rows.append(Row("LoRA r_qv=8 + PreLayer l=12", "GPT-3", lambda _: both, "52.8M", f"PreLayer: {above}", virtual))
    return rows


def _encoder_rows() -> list[Row]:
    """The rows of Table 2 of the LoRA paper, and the heads that it leaves out."""
    misprint = "T10's r=8 is a misprint: the checkpoint, the scripts and T2 have r=16"
    powers = "the figure is that of the matrices alone, in units of 2^20"
    rows = [
        Row("LoRA r_qv=8", "RoBERTa-base", lambda _: _lora("query|value", 8), "0.3M"),
        Row("LoRA r_qv=8", "RoBERTa-large", lambda _: _lora("query|value", 8), "0.8M"),
        Row("LoRA r_qv=16", "DeBERTa-XXL", lambda _: _lora("query|value", 16), "4.7M"),
        Row("LoRA r_qv=8", "DeBERTa-XXL", lambda _: _lora("query|value", 8), "4.7M", misprint),
        Row("BitFit", "RoBERTa-base", _backbone_biases, "0.1M"),
        # The paper cites these without sizes: a sixteenth of the width is usual, and only 4 layers round to 0.3M.
        Row("AdapterDrop r=48, last 4 layers", "RoBERTa-base", _adapter_drop(48, range(8, 12)), "0.3M", scan=False),
        Row("AdapterDrop r=48, all layers", "RoBERTa-base", _adapter_drop(48, range(12)), "0.9M", scan=False),
        Row("Pfeiffer r=16", "RoBERTa-large", _bottleneck(16, _LATE), "0.8M"),
        Row("Pfeiffer r=64", "RoBERTa-large", _bottleneck(64, _LATE), "3.0M", powers),
        Row("Houlsby r=8", "RoBERTa-large", _bottleneck(8, _HOULSBY), "0.8M"),
        Row("Houlsby r=64", "RoBERTa-large", _bottleneck(64, _HOULSBY), "6.0M", powers),
    ]
    return rows + [
        Row("head of 3 classes", model, specs.head) for model in ("RoBERTa-base", "RoBERTa-large", "DeBERTa-XXL")
    ]


def _backbone_biases(base: Any) -> dict[str, lora.Recipe | None]:
    return dict.fromkeys(specs.head(base)) | specs.bitfit(base)


def _decoder_rows() -> list[Row]:
    """The rows of Table 3 of the LoRA paper, and full fine-tuning and BitFit of Table 4."""
    budget = "the figure is 0.1 % of the model; the authors' checkpoint has the exact count"
    more = "the paper has about 98,304 more, 4 vectors of the model's width for each layer"
    neither = "the figure fits neither a tied nor an untied embedding of 50,257 tokens"
    nearest = "the figure is that of Lin's adapters, to which a size of 112 comes nearest"
    biases = "the figure is 12 · width · layers; a layer has 11 vectors of biases, and the last normalization one"
    return [
        Row("LoRA r_qv=4", "GPT-2 M", lambda _: _gpt_lora(4), "0.35M", budget),
        Row("LoRA r_qv=4", "GPT-2 L", lambda _: _gpt_lora(4), "0.77M", "the figure is 0.1 % of the model"),
        Row("full", "GPT-2 M", lambda _: specs.full(), "354.92M", more),
        Row("full", "GPT-2 L", lambda _: specs.full(), "774.03M"),
        Row("top 2 layers", "GPT-2 M", specs.top_layers, "25.19M", scan=False),
        Row("Lin r=6", "GPT-2 M", _bottleneck(6, _LATE, norm=True), "0.37M"),
        Row("Lin r=224", "GPT-2 M", _bottleneck(224, _LATE, norm=True), "11.09M"),
        Row("Houlsby r=112", "GPT-2 M", _bottleneck(112, _HOULSBY), "11.09M", nearest),
        Row("Lin r=8", "GPT-2 L", _bottleneck(8, _LATE, norm=True), "0.88M"),
        Row("Lin r=248", "GPT-2 L", _bottleneck(248, _LATE, norm=True), "23.00M"),
        Row("full", "GPT-3", lambda _: specs.full(), "175,255.8M", neither),
        Row("full", "GPT-3 untied", lambda _: specs.full(), "175,255.8M", neither),
        Row("BitFit", "GPT-3", specs.bitfit, "14.2M", biases),
    ]


def _llama_rows() -> list[Row]:
    """The rows of Tables 1 and 6 of the DoRA paper, and QLoRA's adapters of all linear layers."""
    five, seven = "query|key|value|up|down", "query|key|value|attention/output|gate|up|down"

    def directions_of_qkv(_: Any) -> dict[str, lora.Recipe]:
        # A trained magnitude of a frozen direction is a gain of the output.
        gains = {r"(attention/output|gate|up|down)/kernel$": lora.IA3(axes=("batch", "in", "out"))}
        return _lora("query|key|value", 32, lora.DoRA) | gains

    rows = [
        Row("LoRA r=32 on q, k, v, up, down", "LLaMA-7B", lambda _: _lora(five, 32), ".83%"),
        Row("DoRA r=32 on q, k, v, up, down", "LLaMA-7B", lambda _: _lora(five, 32, lora.DoRA), ".84%"),
        Row("DoRA r=16 on q, k, v, up, down", "LLaMA-7B", lambda _: _lora(five, 16, lora.DoRA), ".43%"),
        Row("DoRA r=32 on q, k, v, magnitudes on all", "LLaMA-7B", directions_of_qkv, ".39%"),
        Row("DoRA r=32 on q, k, v, up, down", "LLaMA-13B", lambda _: _lora(five, 32, lora.DoRA), ".68%"),
        Row("DoRA r=32 on q, k, v, up, down", "LLaMA3-8B", lambda _: _lora(five, 32, lora.DoRA), ".71%"),
    ]
    for model, printed in (("7B", "2.31%"), ("13B", ""), ("33B", ""), ("65B", "")):
        rows.append(Row("LoRA r=64 on all linear layers", f"LLaMA-{model}", lambda _: _lora(seven, 64), printed))
    return rows


ROWS: tuple[Row, ...] = (*_encoder_rows(), *_decoder_rows(), *_gpt3_rows(), *_llama_rows())


def table() -> Table:
    """Returns the table of all rows."""
    lines = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name, justify in (("method", "left"), ("model", "left"), ("exact", "right"), ("paper", "right"), ("", "left")):
        lines.add_column(name, justify=justify, no_wrap=name != "")  # pyrefly: ignore[bad-argument-type]
    for row in ROWS:
        verdict = row.reason if not row.agrees else "" if row.printed else "not printed in the paper"
        lines.add_row(row.method, row.model, f"{row.count:,}", row.printed or "–", verdict)
    return lines


if __name__ == "__main__":
    Console(width=160).print(table())
