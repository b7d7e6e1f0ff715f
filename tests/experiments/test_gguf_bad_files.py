"""Bad GGUF files: one error that lists everything wrong, before tensors are read."""

import re
import struct

import gguf
import numpy as np
import pytest

from experiments import run
from experiments.errors import UserError
from experiments.models import checkpoint, llama, location
from experiments.pretrained.files import open_files
from experiments.pretrained.gguf.reader import StoredTensor
from tests.experiments import gguf_files

LLAMA = gguf_files.FILES / "llama.gguf"
F32 = gguf.GGMLQuantizationType.F32


def problems(path):
    """What the error lists."""
    with pytest.raises(UserError) as error:
        open_files(path)
    first, *lines = str(error.value).splitlines()
    count = int(re.fullmatch(rf"{re.escape(str(path))}: cannot be used \((\d+) problems?\):", first)[1])
    assert count == len(lines) or lines[-1].startswith("  … and ")
    return [line.strip() for line in lines]


def changed(tmp_path, fields=(), tensors=()):
    """A copy of a file with other values of fields and tensors; None removes one."""
    stored_fields, stored_tensors = gguf_files.read(LLAMA)
    for name, value in dict(fields).items():
        types = stored_fields.pop(f"llama.{name}")[1]
        if value is not None:
            stored_fields[f"llama.{name}"] = (value, types)
    for name, value in dict(tensors).items():
        stored_tensors.pop(name, None)
        if value is not None:
            stored_tensors[name] = (np.zeros(value, np.float32), F32)
    return gguf_files.write(tmp_path / "changed.gguf", stored_fields, stored_tensors)


def with_type(path, name, number):
    """Changes the number of the type of a matrix in place."""
    content, key = bytearray(path.read_bytes()), name.encode()
    start = content.index(struct.pack("<Q", len(key)) + key) + 8 + len(key)
    struct.pack_into("<I", content, start + 4 + 8 * 2, number)  # after the number of axes and their sizes
    path.write_bytes(content)


def test_everything_wrong_with_tensors_is_one_error(tmp_path):
    path = changed(
        tmp_path,
        tensors={
            "blk.0.ffn_up.weight": None,
            "blk.1.attn_norm.weight": None,
            "blk.1.ffn_gate.weight": (24, 8),
            "blk.2.attn_norm.weight": (16,),
            "extra.weight": (2, 3),
        },
    )
    with_type(path, "blk.0.attn_v.weight", int(gguf.GGMLQuantizationType.Q4_K))
    with_type(path, "blk.0.attn_k.weight", 99)
    assert problems(path) == [
        "unknown type: blk.0.attn_k.weight has the type 99",
        "shape: blk.0.attn_v.weight is (8, 16), Q4_K has rows of whole blocks of 256",
        "missing: blk.1.attn_norm.weight (16,)",
        "shape: blk.1.ffn_gate.weight is (24, 8), expected (24, 16)",
        "missing: blk.0.ffn_up.weight (24, 16)",
        "unexpected: blk.2.attn_norm.weight (16,)",
        "unexpected: extra.weight (2, 3)",
    ]


def test_truncated_files_name_the_tensors(tmp_path):
    path = tmp_path / "truncated.gguf"
    path.write_bytes(LLAMA.read_bytes()[:-3000])
    size = LLAMA.stat().st_size
    first, *tensors = problems(path)
    assert first == f"truncated: truncated.gguf has {size - 3000:,} bytes, its tensors need {size:,}"
    assert tensors and all(re.fullmatch(r"truncated: [\w.]+", line) for line in tensors)


def test_wrong_fields(tmp_path):
    fields = {"block_count": None, "attention.head_count": 0, "embedding_length": None, "context_length": 2**31}
    assert problems(changed(tmp_path, fields)) == [
        "field: llama.context_length is 2147483648, expected a positive number below 2,147,483,648",
        "missing: the field llama.embedding_length",
        "missing: the field llama.block_count",
        "field: llama.attention.head_count is 0, expected a positive number below 2,147,483,648",
    ]
    assert problems(changed(tmp_path, {"attention.key_length": 3}))[0].startswith("field: heads have 3 features")
    assert "RoPE: the factors are not those of Llama 3's scaling" in problems(
        gguf_files.write(tmp_path / "rope.gguf", *factors([1.5, 1.0]))
    )


def factors(values):
    fields, tensors = gguf_files.read(LLAMA)
    tensors["rope_freqs.weight"] = (np.array(values, np.float32), F32)
    return fields, tensors


@pytest.mark.parametrize("size", [*range(0, 24, 5), 40, 200, 1000])
def test_files_that_end_in_their_header(size, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(LLAMA.read_bytes()[:size])
    message = "not a GGUF file" if size < 4 else "truncated"
    with pytest.raises(UserError, match=f"{re.escape(str(path))}: {message}"):
        open_files(path)


@pytest.mark.parametrize("offset", range(0, 1400, 7))
def test_damaged_headers_are_user_errors(offset, tmp_path):
    """Neither a traceback nor a loop over an absurd number of items."""
    content = bytearray(LLAMA.read_bytes())
    content[offset : offset + 4] = b"\xff\xff\xff\x7f"
    path = tmp_path / f"damaged-{offset}.gguf"
    path.write_bytes(content)
    try:
        checkpoint.read_config(path)
    except UserError as error:
        assert str(path) in str(error)


def test_versions_and_byte_orders(tmp_path):
    content, path = bytearray(LLAMA.read_bytes()), tmp_path / "other.gguf"
    for version in (1, 4):
        content[4:8] = struct.pack("<I", version)
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"GGUF version {version}, supported is 2 or 3"):
            open_files(path)
    gguf_files.write(tmp_path / "big.gguf", *gguf_files.read(LLAMA), endian=gguf.GGUFEndian.BIG)
    with pytest.raises(UserError, match=r"big\.gguf: big-endian; convert it with gguf-convert-endian .* little"):
        open_files(tmp_path / "big.gguf")
    path.write_bytes(b"PK\x03\x04" + bytes(content[4:]))
    with pytest.raises(UserError, match="not a GGUF file"):
        open_files(path)


def test_other_kinds_of_files(tmp_path):
    fields, tensors = gguf_files.read(LLAMA)
    other = fields | {"general.architecture": ("falcon", fields["general.architecture"][1])}
    (line,) = problems(gguf_files.write(tmp_path / "falcon.gguf", other, tensors))
    assert line == "field: general.architecture is 'falcon', supported is one of llama, qwen2, qwen3, gpt2"
    adapter = fields | {"general.type": ("adapter", fields["general.name"][1])}
    assert problems(gguf_files.write(tmp_path / "adapter.gguf", adapter, tensors)) == [
        "field: general.type is 'adapter', expected 'model'"
    ]
    with pytest.raises(UserError, match=r"holds 2 models, name the file of one of them: adapter\.gguf, falcon\.gguf"):
        location.find(str(tmp_path))
    part = gguf_files.write(tmp_path / "x-00002-of-00003.gguf", fields, tensors)
    with pytest.raises(UserError, match=r"2 of 3 parts are missing: x-00001-of-00003\.gguf, x-00003-of-00003\.gguf"):
        open_files(part)
    with pytest.raises(UserError, match="holds a tokenizer, but no model"):
        llama.load(gguf_files.FILES / "tokenizer_llama-spm.gguf")


def test_nothing_is_read_before_the_check(tmp_path, monkeypatch):
    def fail(self, rows):
        raise AssertionError

    monkeypatch.setattr(StoredTensor, "dequantize", fail)
    path = changed(tmp_path, tensors={"blk.0.ffn_up.weight": None, "rope_freqs.weight": None})
    assert problems(path) == ["missing: blk.0.ffn_up.weight (24, 16)"]


def test_the_command_ends_with_status_2(tmp_path, capsys):
    path = changed(tmp_path, tensors={"extra.weight": (2, 3)})
    assert run.main(["sft", "--model", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "unexpected: extra.weight (2, 3)" in capsys.readouterr().err
    assert run.main(["sft", "--model", str(tmp_path / "no.gguf"), "--out", str(tmp_path / "out")]) == 2
    assert "no.gguf: no such file" in capsys.readouterr().err
