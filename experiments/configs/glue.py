"""LoRA beside the methods that it is compared with, by trained parameters (LoRA paper, tables 2 and 15, figure 2)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from experiments import settings
from experiments.configs import glue_papers, papers
from experiments.configs.comparison import PaperComparison
from experiments.configs.method_names import separated_by_commas

METHODS = (
    *("head", "bitfit", "top-layers", "full", "lora", "lora-linear", "houlsby", "pfeiffer"),
    *("prefix", "prompt", "lora-prompt", "adapter-drop"),
)
Methods = Annotated[tuple[str, ...], separated_by_commas(METHODS)]
_GPT3 = papers.gpt3(
    "LoRA, tables 12 and 15",
    lambda task: {
        "^BitFit$": {"lr": (papers.GPT3_RATES["BitFit"],)},
        "adapters": {"lr": (papers.GPT3_RATES["adapters"],)},
        "^prompt": {"prefix_lr": (papers.GPT3_RATES["PreEmbed"],)},
    },
    methods=("head", "bitfit", "full", "lora", "houlsby", "prefix", "prompt"),
    lr=(papers.GPT3_RATES["LoRA"],),
    full_lr=(papers.GPT3_RATES["full"],),
    prefix_lr=(papers.GPT3_RATES["PreLayer"],),
)


@dataclass(frozen=True)
class Config(PaperComparison):
    """Trains every method of the LoRA paper's tables 2 and 15 at several sizes, and draws accuracy against parameters.

    Full fine-tuning, BitFit, the top two layers, bottleneck adapters (Houlsby, Pfeiffer), prefix tuning, prompt tuning,
    LoRA, LoRA with a prompt, and the head alone. Of two learning rates, validation selects one for each row. The paper
    trains RoBERTa and DeBERTa on GLUE, and GPT-3 175B on WikiSQL and MNLI. Here all-MiniLM-L6-v2 classifies Debian
    packages into sections; --paper, with --model and --data, is the original setting.
    """

    STUDY = "experiments.studies.glue"
    MINUTES = 45
    PRESETS: ClassVar = glue_papers.PRESETS | {"gpt-3": _GPT3}
    FAST: ClassVar = {"ranks": (2,), "linear_ranks": (1,), "sizes": (2,), "prefixes": (2,), "prompts": (2,)}

    out: Path = Path("runs/glue")
    """The output directory. Runs that it already holds are resumed or read, not repeated."""

    paper: Literal["roberta-base", "roberta-large", "roberta-large-houlsby", "deberta-xxl", "gpt-3"] | None = None
    """The setting of the LoRA paper on one of GLUE's tasks, with --model and --data: roberta-base and roberta-large
    (table 9), roberta-large-houlsby (table 9, fixed length and batch size, with adapters), deberta-xxl (table 10), or
    gpt-3 (table 12 on MNLI, for another model). Other flags win."""

    methods: Methods = METHODS[:-1]
    """The methods to compare, separated by commas: head (alone), bitfit, top-layers, full, lora (on query and value),
    lora-linear (on all linear layers), houlsby, pfeiffer, prefix, prompt, lora-prompt, adapter-drop (Pfeiffer adapters
    of a sixteenth of the width, in the last third of the layers and in all)."""

    ranks: tuple[int, ...] = (1, 8, 64)
    """Ranks of LoRA on query and value."""

    linear_ranks: tuple[int, ...] = (8,)
    """Ranks of LoRA on all linear layers."""

    sizes: tuple[int, ...] = (8, 64, 256)
    """Sizes of bottleneck adapters."""

    prefixes: tuple[int, ...] = (4, 16, 64)
    """Lengths of prefixes: keys and values of every layer."""

    prompts: tuple[int, ...] = (8, 32)
    """Lengths of prompts: embeddings before the text."""

    lr: tuple[float, ...] = (1e-3, 3e-3)
    """Peak learning rates of LoRA, bottleneck adapters and BitFit."""

    prefix_lr: tuple[float, ...] = (1e-2, 3e-2)
    """Peak learning rates of prefixes and prompts."""

    full_lr: tuple[float, ...] = (1e-4, 3e-4)
    """Peak learning rates of full fine-tuning, and of the top layers."""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.positive(self, "ranks", "linear_ranks", "sizes", "prefixes", "prompts", "lr", "prefix_lr", "full_lr")


DEFAULTS = Config()
