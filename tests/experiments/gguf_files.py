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
