"""The encoder of a checkpoint, and the tokens that end its texts."""

from pathlib import Path

from experiments.configs.decoder import DecoderConfig
from experiments.errors import UserError
from experiments.input.encoding import Encoder, load_encoder
from experiments.models import checkpoint
from experiments.pretrained.files import open_files

_GENERATION = "generation_config.json"


def read_encoder(config: DecoderConfig, directory: Path) -> Encoder:
    """Loads the encoder of a checkpoint with the config's options."""
    ends = read_end_tokens(directory)
    vocabulary = checkpoint.read_config(directory).get("vocab_size")
    if not isinstance(vocabulary, int):  # loading the model reports it
        vocabulary = None
    return load_encoder(directory, ends[0] if ends else None, config.encoding(), ends=ends, vocabulary=vocabulary)


def read_end_tokens(directory: Path) -> tuple[int, ...]:
    """Reads the tokens that end a text from `generation_config.json`, or from `config.json`."""
    value = None
    if open_files(directory).read(_GENERATION) is not None:
        value = checkpoint.read_config(directory, _GENERATION).get("eos_token_id")
    if value is None:
        value = checkpoint.read_config(directory).get("eos_token_id")
    numbers = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(number, int) and 0 <= number < 1 << 31 for number in numbers):
        raise UserError(f"{directory}: eos_token_id is {value!r}, expected a token id or a list of them")
    return numbers
