"""Scores answers of a base and an adapter."""

from dataclasses import dataclass
from pathlib import Path

from experiments import settings
from experiments.configs.decoder import Float, Quantization
from experiments.evaluation.decoding import Decoding
from experiments.input.forms import FormName
from experiments.training.runtime import Runtime


@dataclass(frozen=True)
class Config(Decoding, Runtime):
    """Answers held-out examples and prints perplexity, ROUGE-L and BLEU.

    It compares the base, the base with three training examples in its prompt, and the adapter, unmerged and merged.
    Model, data and chat template are those that `sft` recorded with the adapter, unless they are set here. The default
    takes about 4 minutes on 2 CPU cores with SmolLM2-135M. Scores and all answers are written to --out as JSON.
    """

    STUDY = "experiments.studies.evaluate"
    MINUTES = 4

    adapter: Path | None = None
    """The adapter: a directory that lora_jax or PEFT wrote, or the output directory of a run of sft, whose best adapter
    is used. None evaluates the base only."""

    model: str | None = None
    """The base, named as for sft. None uses the one that is recorded with the adapter."""

    data: tuple[str, ...] = ()
    """The held-out examples, named as for sft: the test examples of a directory or data set, else its validation
    examples; or the examples of a single file. Empty uses the data that is recorded with the adapter."""

    data_form: FormName | None = None
    """The format of the records of --data; see sft."""

    test_examples: int | None = 40
    """Maximum number of examples, from the beginning. None uses all."""

    new_tokens: int = 40
    """Maximum number of tokens per answer."""

    quantize: Quantization | None = None
    """The quantization of the base's linear layers; see sft. None uses the one that is recorded with the adapter."""

    dtype: Float | None = None
    """The dtype of activations and of the base's weights that are not quantized. None uses the recorded one."""

    template: str | None = None
    """A chat template; see sft. None uses the recorded one."""

    out: Path = Path("runs/evaluate")
    """The output directory. Scores of the same answers that it already holds are shown, not computed again."""

    fresh: bool = False
    """Compute the scores again, even if --out holds them."""

    def __post_init__(self) -> None:
        Runtime.__post_init__(self)
        Decoding.__post_init__(self)
        settings.positive(self, "test_examples", "new_tokens")
        if isinstance(self.data, str):
            object.__setattr__(self, "data", (self.data,))


DEFAULTS = Config()
