"""The GGUF files that llama.cpp's converter made, and changed copies of them."""

from pathlib import Path

import gguf
import numpy as np

FILES = Path(__file__).parent / "fixtures" / "gguf"


def read(path):
    """The fields, with their types, and the tensors of a file: `{name: (array, type)}`."""
    reader = gguf.GGUFReader(path)
    fields = {name: (field.contents(), field.types) for name, field in reader.fields.items() if "GGUF." not in name}
    tensors = {tensor.name: (np.array(tensor.data), tensor.tensor_type) for tensor in reader.tensors}
    return fields, tensors


def write(path, fields, tensors, endian=gguf.GGUFEndian.LITTLE):
    """Writes a file with these fields and tensors."""
    writer = gguf.GGUFWriter(path, fields["general.architecture"][0], endianess=endian)
    for name, (value, types) in fields.items():
        if name == "general.architecture":
            continue
        writer.add_key_value(name, value, types[0], types[1] if len(types) > 1 else None)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def widen(folder, kind, name="llama", other=None):
    """A model whose rows are whole blocks, with codes of a type, and its copy with the dequantized numbers.

    With `other`, the last layer has codes of that type.
    """
    rng = np.random.default_rng(0)
    fields, tensors = read(FILES / f"{name}.gguf")
    width, hidden = (256, 256) if kind in SCALES else (64, 256 if name == "gpt2" else 96)
    sizes = {16: width, 24: hidden, 8: width // 2, 48: 3 * width, 64: hidden}
    prefix, head = fields["general.architecture"][0], width // 4
    changes = dict.fromkeys(("attention.key_length", "attention.value_length", "rope.dimension_count"), head)
    changes |= {"embedding_length": width, "feed_forward_length": hidden}
    for field, value in changes.items():
        if f"{prefix}.{field}" in fields:
            fields[f"{prefix}.{field}"] = (value, fields[f"{prefix}.{field}"][1])
    tensors.pop("rope_freqs.weight", None)
    plain, coded = {}, {}
    for tensor, (data, _) in tensors.items():
        values = rng.normal(size=[sizes.get(size, size) for size in data.shape]).astype(np.float32)
        chosen = other if other and tensor.startswith("blk.1.") else kind
        # As the converter has it, routers and positions are numbers.
        is_number = values.ndim < 2 or "ffn_gate_inp" in tensor or "position" in tensor
        form = gguf.GGMLQuantizationType["F32" if is_number else chosen]
        codes = blocks(rng, form, values.shape) if form.name in SCALES else gguf.quants.quantize(values, form)
        coded[tensor] = (codes, form)
        numbers = gguf.quants.dequantize(codes, form).reshape(values.shape)
        plain[tensor] = (numbers, gguf.GGMLQuantizationType.F32)
    return write(folder / "codes.gguf", fields, coded), write(folder / "plain.gguf", fields, plain)


SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""The first bytes of the float16 numbers in a block of the types that the package does not quantize to."""


def blocks(rng, form, shape):
    """Random blocks with finite scales, `uint8[*shape[:-1], bytes]`."""
    size, length = gguf.GGML_QUANT_SIZES[form]
    codes = rng.integers(0, 256, (*shape[:-1], shape[-1] // size, length), np.uint8)
    for first in SCALES[form.name]:
        scales = rng.normal(scale=1e-3, size=codes.shape[:-1]).astype(np.float16)
        codes[..., first : first + 2] = scales[..., None].view(np.uint8)
    return codes.reshape(*shape[:-1], -1)
