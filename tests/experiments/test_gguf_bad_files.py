"""Bad GGUF files: one error that lists everything wrong, before tensors are read."""

import re
import struct

import gguf
import numpy as np
import pytest

from experiments import run
from experiments.errors import UserError
from experiments.models import checkpoint, families, llama, location
from experiments.pretrained.files import open_files
from experiments.pretrained.gguf import files
from experiments.pretrained.gguf.reader import StoredTensor
from tests.experiments import gguf_files
from tests.experiments.decoders import ALL

LLAMA = gguf_files.FILES / "llama.gguf"
F32 = gguf.GGMLQuantizationType.F32
NAMES_OF_A_LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up")


def problems(path):
    """What the error lists."""
    with pytest.raises(UserError) as error:
        open_files(path)
    first, *lines = str(error.value).splitlines()
    count = int(re.fullmatch(rf"{re.escape(str(path))}: cannot be used \((\d+) problems?\):", first)[1])
    assert count == len(lines) or any(": … and " in line for line in lines)
    return [line.strip() for line in lines]


def changed(tmp_path, fields=(), tensors=(), **options):
    """A copy of a file with other values of fields and tensors; None removes one."""
    stored_fields, stored_tensors = gguf_files.read(LLAMA)
    for name, value in dict(fields).items():
        types = stored_fields.pop(f"llama.{name}", (None, [gguf.GGUFValueType.UINT32]))[1]
        if value is not None:
            stored_fields[f"llama.{name}"] = (value, types)
    for name, value in dict(tensors).items():
        stored_tensors.pop(name, None)
        if value is not None:
            stored_tensors[name] = (np.zeros(value, np.float32), F32)
    return gguf_files.write(tmp_path / "changed.gguf", stored_fields, stored_tensors, **options)


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
        "shape: blk.1.ffn_gate.weight is (24, 8), expected (24, 16)",
        "missing: blk.1.attn_norm.weight (16,)",
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


def test_a_frequent_problem_hides_no_other(tmp_path):
    missing = [f"blk.{layer}.{name}.weight" for layer in range(2) for name in NAMES_OF_A_LAYER]
    path = changed(tmp_path, tensors=dict.fromkeys(missing) | {"extra.weight": (2, 3)})
    path.write_bytes(path.read_bytes()[:-20])  # a tensor is padded to 32 bytes
    lines = problems(path)
    assert lines[0].startswith("truncated: changed.gguf has ") and lines[1] == "truncated: extra.weight"
    assert len(lines) == 2 + 12 + 1 and lines[-1] == f"missing: … and {len(missing) - 12} more"


def test_wrong_fields(tmp_path):
    fields = {"block_count": None, "attention.head_count": 0, "embedding_length": None, "context_length": 2**31}
    tensors = {"blk.1.attn_q.weight": None, "extra.weight": (2, 3)}
    assert problems(changed(tmp_path, fields, tensors)) == [
        "field: llama.context_length is 2147483648, expected a whole number above 0 and below 2,147,483,648",
        "field: llama.attention.head_count is 0, expected a whole number above 0 and below 2,147,483,648",
        "missing: the field llama.embedding_length",
        "missing: the field llama.block_count",
        "missing: blk.1.attn_q.weight",
        "unexpected: extra.weight (2, 3)",
    ]
    odd = "field: llama.attention.key_length: heads have 3 features, RoPE rotates pairs of them"
    assert odd in problems(changed(tmp_path, {"attention.key_length": 3}))
    assert "RoPE: the factors are not those of Llama 3's scaling" in problems(
        gguf_files.write(tmp_path / "rope.gguf", *factors([1.5, 1.0]))
    )


VALUES = (0, 1, 3, 10**6, 2**32 - 1, "text", [1, 2], -1.0, float("nan"), True)


@pytest.mark.parametrize("name", ALL)
def test_every_field_is_checked_by_its_own_name(name, tmp_path):
    """What the fields of a file say wrong is never said of a config.json, which a user does not have."""
    fields, tensors = gguf_files.read(gguf_files.FILES / f"{name}.gguf")
    fields = {field: value for field, value in fields.items() if not field.startswith("tokenizer.")}
    prefix = fields["general.architecture"][0]
    more = ("attention.sliding_window", "rope.scaling.type", "rope.scaling.factor", "expert_count")
    names = {field for field in fields if field.startswith(f"{prefix}.")} | {f"{prefix}.{field}" for field in more}
    for field in sorted(names):
        for value in VALUES:
            path = gguf_files.write(tmp_path / "changed.gguf", {**fields, field: (value, types_of(value))}, tensors)
            try:
                config = checkpoint.read_config(path)
                families.get_family(config).shape(config)
            except UserError as error:
                assert str(error).startswith(f"{path}: cannot be used ("), (field, value)
                assert "config.json" not in str(error), (field, value)


def types_of(value):
    """The types with which a file stores a value."""
    kind = gguf.GGUFValueType.get_type(value)
    if kind == gguf.GGUFValueType.INT32:
        kind = gguf.GGUFValueType.UINT32
    return [kind, gguf.GGUFValueType.UINT32] if kind == gguf.GGUFValueType.ARRAY else [kind]


def factors(values):
    fields, tensors = gguf_files.read(LLAMA)
    tensors["rope_freqs.weight"] = (np.array(values, np.float32), F32)
    return fields, tensors


@pytest.mark.parametrize("size", [*range(0, 24, 5), 40, 200, 1000])
def test_files_that_end_in_their_header(size, tmp_path):
    path = tmp_path / "short.gguf"
    path.write_bytes(LLAMA.read_bytes()[:size])
    (line,) = problems(path)
    assert line.startswith("not GGUF: short.gguf" if size < 4 else "truncated or damaged: short.gguf (it ")


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
        (line,) = problems(path)
        assert line.startswith(f"version: other.gguf has GGUF version {version}, supported is 2 or 3")
    path.write_bytes(b"PK\x03\x04" + bytes(content[4:]))
    assert problems(path) == ["not GGUF: other.gguf does not begin with the bytes GGUF"]


def test_a_big_endian_file_is_checked_in_full(tmp_path):
    tensors = {"blk.0.ffn_up.weight": None, "extra.weight": (2, 3)}
    path = changed(tmp_path, {"rope.dimension_count": 2}, tensors, endian=gguf.GGUFEndian.BIG)
    assert problems(path) == [
        f"big-endian: changed.gguf; convert it with gguf-convert-endian {path} little",
        "field: llama.rope.dimension_count is 2, supported is all 4 of a head",
        "missing: blk.0.ffn_up.weight",
        "unexpected: extra.weight (2, 3)",
    ]


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
    with_type(part, "blk.0.attn_k.weight", 99)
    (tmp_path / "x-00003-of-00003.gguf").write_bytes(part.read_bytes()[:900])
    with pytest.raises(UserError) as error:
        open_files(part)
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == [
        "missing: the part x-00001-of-00003.gguf",
        "truncated or damaged: x-00003-of-00003.gguf (it ends at byte 900, within its header)",
        "unknown type: blk.0.attn_k.weight has the type 99",
    ]
    with pytest.raises(UserError, match="holds a tokenizer, but no model"):
        llama.load(gguf_files.FILES / "tokenizer_llama-spm.gguf")


def test_nothing_is_read_before_the_check(tmp_path, monkeypatch):
    def fail(*rows):
        raise AssertionError

    monkeypatch.setattr(StoredTensor, "dequantize", fail)
    monkeypatch.setattr(files, "is_copied", fail)
    path = changed(tmp_path, tensors={"blk.0.ffn_up.weight": None, "rope_freqs.weight": None})
    assert problems(path) == ["missing: blk.0.ffn_up.weight (24, 16)"]


def test_the_command_ends_with_status_2(tmp_path, capsys):
    path = changed(tmp_path, tensors={"extra.weight": (2, 3)})
    assert run.main(["sft", "--model", str(path), "--out", str(tmp_path / "out")]) == 2
    assert "unexpected: extra.weight (2, 3)" in capsys.readouterr().err
    assert run.main(["sft", "--model", str(tmp_path / "no.gguf"), "--out", str(tmp_path / "out")]) == 2
    assert "no.gguf: no such file" in capsys.readouterr().err
