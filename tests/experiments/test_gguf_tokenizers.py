"""Tokenizers of GGUF files: llama.cpp's fixtures, reduced to the tokens of their texts, and SmolLM2's."""

import json

import gguf
import pytest
from tokenizers import Tokenizer

from experiments.errors import UserError
from experiments.input.template_files import load_template, special_tokens
from experiments.models import location
from experiments.pretrained.gguf.reader import read
from experiments.pretrained.gguf.tokenizer import build_tokenizer
from tests.experiments import gguf_files

EXPECTED = json.loads((gguf_files.FILES / "tokenizers.json").read_text("utf-8"))
FORMS = ("gpt-2", "llama-bpe", "qwen2", "refact", "llama-spm")
ARRAY, STRING, INT32, UINT32, BOOL, FLOAT32 = (
    gguf.GGUFValueType[name] for name in ("ARRAY", "STRING", "INT32", "UINT32", "BOOL", "FLOAT32")
)


@pytest.mark.parametrize("name", FORMS)
def test_tokens_are_those_of_llama_cpp(name):
    tokenizer = build_tokenizer(read(gguf_files.FILES / f"tokenizer_{name}.gguf"))
    restored = Tokenizer.from_str(tokenizer.to_str())
    for text, tokens in zip(EXPECTED[name]["texts"], EXPECTED[name]["tokens"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == tokens, text
        assert restored.encode(text, add_special_tokens=False).ids == tokens, text
        assert tokenizer.decode(tokens) == text


def test_tokens_of_smollm2_are_those_of_transformers():
    tokenizer = build_tokenizer(read(location.find(location.SMOLLM2)))
    for text, tokens in zip(EXPECTED["smollm2"]["texts"], EXPECTED["smollm2"]["tokens"], strict=True):
        assert tokenizer.encode(text).ids == tokens, text
        assert tokenizer.decode(tokens, skip_special_tokens=False) == text


def changed(tmp_path, name, changes):
    """A copy of a reduced fixture with other fields; None removes a field."""
    fields, tensors = gguf_files.read(gguf_files.FILES / f"tokenizer_{name}.gguf")
    for key, field in changes.items():
        fields.pop(f"tokenizer.{key}", None)
        if field is not None:
            fields[f"tokenizer.{key}"] = field
    return gguf_files.write(tmp_path / "changed.gguf", fields, tensors)


def pieces(path, text, **options):
    return build_tokenizer(read(path)).encode(text, **options).tokens


def test_the_default_form_is_llama_cpps(tmp_path):
    """It splits punctuation, and numbers into groups of three digits from the left."""
    for pre in (None, ("default", [STRING])):
        path = changed(tmp_path, "gpt-2", {"ggml.pre": pre})
        words = build_tokenizer(read(path)).pre_tokenizer.pre_tokenize_str("Hello=='s 12345")
        assert [word for word, _ in words] == ["Hello", "=='", "s", "\u0120", "123", "45"]


def test_begins_and_ends(tmp_path):
    """The defaults are llama.cpp's: SentencePiece and Llama 3 begin a text, others do not."""
    begins = {name: pieces(gguf_files.FILES / f"tokenizer_{name}.gguf", "Hello")[0] for name in FORMS}
    assert begins == {
        "gpt-2": "Hello",
        "llama-bpe": "<|begin_of_text|>",
        "qwen2": "Hello",
        "refact": "Hello",
        "llama-spm": "<s>",
    }
    both = {"ggml.add_bos_token": (False, [BOOL]), "ggml.add_eos_token": (True, [BOOL])}
    assert pieces(changed(tmp_path, "llama-spm", both), "Hello") == ["\u2581Hello", "</s>"]


def test_kinds_of_tokens(tmp_path):
    """Control and user-defined tokens are whole in a text; unknown characters are bytes."""
    fields, _ = gguf_files.read(gguf_files.FILES / "tokenizer_llama-spm.gguf")
    tokens, kinds, scores = ([*fields[f"tokenizer.ggml.{name}"][0]] for name in ("tokens", "token_type", "scores"))
    lists = {
        "ggml.tokens": ([*tokens, "<|end|>", "<think>", "<unused>"], [ARRAY, STRING]),
        "ggml.token_type": ([*kinds, 3, 4, 5], [ARRAY, INT32]),
        "ggml.scores": ([*scores, 0.0, 0.0, 0.0], [ARRAY, FLOAT32]),
        "ggml.add_space_prefix": (False, [BOOL]),
    }
    path = changed(tmp_path, "llama-spm", lists)
    tokenizer = build_tokenizer(read(path))
    encoded = tokenizer.encode("<think>x<|end|>\u2603<unused>", add_special_tokens=False)
    assert (
        encoded.tokens[:6] == ["<think>", "x", "<|end|>", "<0xE2>", "<0x98>", "<0x83>"]
        and "<unused>" not in encoded.tokens
    )
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "<think>x\u2603<unused>"


def test_what_is_refused(tmp_path):
    path = changed(tmp_path, "gpt-2", {"ggml.pre": ("gpt-4o", [STRING])})
    with pytest.raises(UserError, match=r"the pre-tokenizer is 'gpt-4o', supported is one of default, gpt-2, .*qwen2"):
        build_tokenizer(read(path))
    path = changed(tmp_path, "gpt-2", {"ggml.model": ("rwkv", [STRING])})
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.model is 'rwkv', supported is 'gpt2' .* or 'llama'"):
        build_tokenizer(read(path))
    path = changed(tmp_path, "gpt-2", {"ggml.tokens": None})
    with pytest.raises(UserError, match="holds no tokenizer"):
        build_tokenizer(read(path))
    path = changed(tmp_path, "llama-spm", {"ggml.scores": ([0.0], [ARRAY, FLOAT32])})
    with pytest.raises(UserError, match=r"scores has 1 of \d+ values"):
        build_tokenizer(read(path))
    path = changed(tmp_path, "gpt-2", {"ggml.merges": (["no such"], [ARRAY, STRING])})
    with pytest.raises(UserError, match="cannot be read as a tokenizer"):
        build_tokenizer(read(path))


def test_templates(tmp_path):
    """The default template, others by name, and the special tokens that they read."""
    changes = {
        "chat_template": ("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", [STRING]),
        "chat_templates": (["tool_use"], [ARRAY, STRING]),
        "chat_template.tool_use": ("tools {{ messages }}", [STRING]),
    }
    path = changed(tmp_path, "llama-spm", changes)
    template = load_template(path)
    assert template is not None and template.with_tools is not None
    assert template.source.startswith("{{ bos_token }}") and template.with_tools.source.startswith("tools")
    assert special_tokens(path) == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert load_template(gguf_files.FILES / "tokenizer_gpt-2.gguf") is None


def test_special_tokens_outside_the_vocabulary_are_ignored(tmp_path):
    """As in llama.cpp: some files have the largest integer where there is no such token."""
    path = changed(tmp_path, "llama-spm", {"ggml.padding_token_id": (2**32 - 1, [UINT32])})
    assert "pad_token" not in special_tokens(path) and special_tokens(path)["eos_token"] == "</s>"
