"""The exact numbers of trained parameters of the papers' configurations, on full-sized models without arrays."""

import re

import jax.numpy as jnp
import pytest

import lora_jax as lora
from experiments.baselines import counts, prefix_layer_tuning, prefix_tuning, prompt_tuning
from experiments.models.virtual import Shape

EXACT = {
    "RoBERTa-base": {
        "LoRA r_qv=8": 294_912,
        "BitFit": 102_144,
        "head of 3 classes": 592_899,
        "AdapterDrop r=48, last 4 layers": 4 * (2 * 768 * 48 + 48 + 768),
        "AdapterDrop r=48, all layers": 12 * (2 * 768 * 48 + 48 + 768),
    },
    "RoBERTa-large": {
        "LoRA r_qv=8": 786_432,
        "head of 3 classes": 1_052_675,
        "Pfeiffer r=16": 811_392,
        "Pfeiffer r=64": 3_171_840,
        "Houlsby r=8": 835_968,
        "Houlsby r=64": 6_343_680,
    },
    "DeBERTa-XXL": {"LoRA r_qv=16": 4_718_592, "LoRA r_qv=8": 2_359_296, "head of 3 classes": 2_365_443},
    "GPT-2 M": {
        "LoRA r_qv=4": 393_216,
        "full": 354_823_168,
        "top 2 layers": 25_192_448,
        "Lin r=6": 368_784,
        "Lin r=224": 11_089_152,
        "Houlsby r=112": 11_064_576,
    },
    "GPT-2 L": {
        "LoRA r_qv=4": 737_280,
        "full": 774_030_080,
        "Lin r=8": 875_808,
        "Lin r=248": 23_002_848,
    },
    "GPT-3 untied": {"full": 175_221_817_344},
    "GPT-3": {
        "full": 174_604_259_328,
        "BitFit": 96 * 11 * 12_288 + 12_288,
        **dict.fromkeys(("LoRA r_qv=1", "LoRA r_v=2"), 4_718_592),
        **dict.fromkeys(("LoRA r_qv=2", "LoRA r_qkvo=1"), 9_437_184),
        **dict.fromkeys(("LoRA r_qv=4", "LoRA r_qkvo=2", "LoRA r_q=8"), 18_874_368),
        **dict.fromkeys(("LoRA r_qv=8", "LoRA r_qkvo=4"), 37_748_736),
        "LoRA r_qv=64": 301_989_888,
        "LoRA r_qkvo=64": 603_979_776,
        "Houlsby r=1": 7_078_080,
        "Houlsby r=4": 21_234_432,
        "Houlsby r=8": 40_109_568,
        "Houlsby r=16": 77_859_840,
        "Houlsby r=64": 304_361_472,
        "PreEmbed l=40": 491_520,
        "PreEmbed l=72": 884_736,
        "PreEmbed l=136": 1_671_168,
        "PreEmbed l=264": 3_244_032,
        "PreEmbed l=520": 6_389_760,
        "PreLayer l=4": 4_718_592,
        "PreLayer l=8": 9_437_184,
        "PreLayer l=16": 18_874_368,
        "PreLayer l=36": 42_467_328,
        "PreLayer l=64": 75_497_472,
        "LoRA r_qv=8 + PreEmbed l=12": 37_896_192,
        "LoRA r_qv=32 + PreEmbed l=12": 151_142_400,
        "LoRA r_qv=64 + PreEmbed l=12": 302_137_344,
        "LoRA r_qv=8 + PreLayer l=12": 51_904_512,
    },
    "LLaMA-7B": {
        "LoRA r=32 on q, k, v, up, down": 56_098_816,
        "DoRA r=32 on q, k, v, up, down": 56_975_360,
        "DoRA r=16 on q, k, v, up, down": 28_925_952,
        "DoRA r=32 on q, k, v, magnitudes on all": 26_525_696,
        "LoRA r=64 on all linear layers": 159_907_840,
    },
    "LLaMA-13B": {"DoRA r=32 on q, k, v, up, down": 89_190_400, "LoRA r=64 on all linear layers": 250_347_520},
    "LLaMA-33B": {"LoRA r=64 on all linear layers": 487_587_840},
    "LLaMA-65B": {"LoRA r=64 on all linear layers": 799_539_200},
    "LLaMA3-8B": {"DoRA r=32 on q, k, v, up, down": 57_409_536},
}
DIFFERENT = {
    ("DeBERTa-XXL", "LoRA r_qv=8"),
    ("GPT-2 M", "LoRA r_qv=4"),
    ("GPT-2 L", "LoRA r_qv=4"),
    ("GPT-2 M", "full"),
    ("GPT-2 M", "Houlsby r=112"),
    ("RoBERTa-large", "Pfeiffer r=64"),
    ("RoBERTa-large", "Houlsby r=64"),
    ("GPT-3", "full"),
    ("GPT-3 untied", "full"),
    ("GPT-3", "BitFit"),
    ("GPT-3", "LoRA r_qkvo=64"),
    *(("GPT-3", f"PreLayer l={length}") for length in (4, 8, 16, 36, 64)),
    ("GPT-3", "LoRA r_qv=8 + PreLayer l=12"),
}
"""The configurations for which the paper prints another number."""


@pytest.mark.parametrize("row", counts.ROWS, ids=lambda row: f"{row.model}, {row.method}")
def test_counts_are_exact(row):
    assert row.count == EXACT[row.model][row.method]
    assert row.agrees == ((row.model, row.method) not in DIFFERENT)
    assert bool(row.reason) == (not row.agrees)


def test_every_count_has_a_row():
    rows = [(row.model, row.method) for row in counts.ROWS]
    assert sorted(rows) == sorted((model, method) for model, methods in EXACT.items() for method in methods)


def test_a_figure_is_rounded_or_truncated():
    def row(printed):
        return counts.Row(
            "", "RoBERTa-base", lambda base: {"query/kernel": lora.LoRA(8, axes=("batch", "in", "out"))}, printed
        )

    assert row("").count == 147_456
    agrees = {
        printed: row(printed).agrees for printed in ("0.1M", "0.15M", "0.14M", "0.2M", ".11%", ".12%", ".13%", "")
    }
    assert [printed for printed, verdict in agrees.items() if not verdict] == ["0.2M", ".13%"]


def test_the_tables_of_virtual_tokens_have_the_sizes_of_their_functions(getkey):
    # |Θ| of §5.1: width · tokens, and layers · width · tokens; keys and values are twice the latter.
    shape = Shape(layers=3, groups=2, head=4, width=16)
    assert counts.size(prompt_tuning.init(getkey(), jnp.ones((9, 16)), 5)) == 16 * 5
    assert counts.size(prefix_layer_tuning.init(getkey(), shape, 5)) == 3 * 16 * 5
    assert counts.size(prefix_tuning.init(getkey(), shape, 5)) == 2 * 3 * 8 * 5
    network = prefix_tuning.init(getkey(), shape, 5, hidden=7)
    assert counts.size(network) == 5 * 8 + (8 + 1) * 7 + (7 + 1) * 2 * 3 * 8


def test_the_table_has_counts_figures_and_reasons(capsys):
    counts.Console(width=200).print(counts.table())
    text = capsys.readouterr().out
    assert re.search(r"LoRA r_qv=8 +RoBERTa-base +294,912 +0\.3M\s*\n", text)
    assert re.search(r"full +GPT-3 +174,604,259,328 +175,255\.8M +the figure fits neither", text)
