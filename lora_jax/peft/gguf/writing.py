"""Writes an adapter as the GGUF file that llama.cpp's `convert_lora_to_gguf.py` makes of PEFT's format."""

import collections
import dataclasses
import re
from pathlib import Path

import numpy as np

from lora_jax.io.files import create_parents, replace_file
from lora_jax.io.read_errors import BREAK
from lora_jax.peft.arrays import fold_scale, pad_module, replace_tensors
from lora_jax.peft.experts import FUSED_PARTS
from lora_jax.peft.gguf.files import import_gguf, load_metadata
from lora_jax.peft.gguf.model import EXPERT_MATRICES, GgufModel
from lora_jax.peft.llama_cpp import common_alpha, split_expert
from lora_jax.peft.module import Module
from lora_jax.peft.problems import collect_problems
from lora_jax.peft.targets import refuse_for_gguf
from lora_jax.peft.torch_adapter import TorchAdapter

DTYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16"}
"""The names of GGUF's types of floats, by option."""

Stack = dict[str, dict[int, Module[np.ndarray]]]


def describe_unsupported(adapter: TorchAdapter, model: GgufModel) -> list[str]:
    """Lists what llama.cpp does not support in an adapter."""
    problems = [*adapter.problems, *refuse_for_gguf(adapter, ("linear", "conv1d", "embedding", "experts"))]
    with collect_problems(problems):
        _to_weights(adapter, model)
    return problems


def write_file(
    file: Path, adapter: TorchAdapter, model: GgufModel, *, dtype: str = "f32", source: Path | None = None
) -> None:
    """Writes an adapter as a GGUF file, which is complete or absent.

    Args:
      file: The file.
      adapter: The adapter.
      model: Its base.
      dtype: The type of the factors, one of :data:`DTYPES`.
      source: The directory that the adapter comes from. Its name, its model card and its config define the file's
        metadata, as for llama.cpp's converter.

    Raises:
      ValueError: A factor does not fit the type.
    """
    gguf = import_gguf()
    alpha, modules = common_alpha(_to_weights(adapter, model))
    writer = gguf.GGUFWriter(None, model.architecture)
    kind = gguf.GGMLQuantizationType[DTYPES[dtype]]
    for module in modules:
        for part in ("a", "b"):
            value = np.ascontiguousarray(module.tensors[part], np.float32)
            if dtype == "f16" and (largest := np.max(np.abs(value), initial=0.0)) > np.finfo(np.float16).max:
                raise ValueError(f"{module.name}.lora_{part} is up to {largest:.4g}, which f16 does not hold: use f32.")
            writer.add_tensor(f"{module.name}.lora_{part}", gguf.quants.quantize(value, kind), raw_dtype=kind)
    numbers, _, _, _ = writer.get_total_parameter_count()
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    metadata = load_metadata(source, numbers)
    metadata.name = metadata.name or model.name
    metadata.set_gguf_meta_model(writer)
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, float(alpha))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    with create_parents(file), replace_file(file) as fresh:
        writer.write_header_to_file(path=fresh)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _to_weights(adapter: TorchAdapter, model: GgufModel) -> list[Module[np.ndarray]]:
    """Converts modules to weights of llama.cpp, with its names and layouts: experts' factors are 3-dimensional."""
    weights: list[Module[np.ndarray]] = []
    problems: list[str] = []
    stacks: Stack = collections.defaultdict(dict)
    for module in adapter.modules:
        with collect_problems(problems):
            if module.kind == "experts":
                weights += _split_parameter(module, model)
            elif (key := split_expert(module.name)) is not None and model.experts:
                experts, expert, matrix = key
                if expert >= model.experts:
                    raise ValueError(f"{module.label}: {model.name} has {model.experts} experts only")
                stacks[_stack_name(experts, matrix)][expert] = module
            else:
                weights.append(_to_weight(module, model))
    if problems:
        raise ValueError(BREAK.join(problems))
    return weights + [_stack_experts(name, experts, model.experts) for name, experts in stacks.items()]


def _to_weight(module: Module[np.ndarray], model: GgufModel) -> Module[np.ndarray]:
    name = None if module.is_parameter else model.weight_name(module.path)
    if name is None:
        raise ValueError(f"{module.label}: llama.cpp's {model.architecture} applies no adapter to such a module")
    if model.tied and name in ("token_embd", "output"):
        raise ValueError(f"{module.label}: llama.cpp supports no factors of an embedding that is also the head (tied)")
    a, b = module.tensors["a"], module.tensors["b"]
    if module.kind == "embedding":  # looked up, and multiplied with B
        return dataclasses.replace(replace_tensors(module, a=a.T), name=f"{name}.weight")
    return dataclasses.replace(replace_tensors(module, b=model.to_stored_rows(name, b)), name=f"{name}.weight")


def _split_parameter(module: Module[np.ndarray], model: GgufModel) -> list[Module[np.ndarray]]:
    """Splits the factors of a parameter of all experts, A `[rank·experts, in]` and B `[out, rank·experts]`."""
    if not model.experts or module.parameter not in FUSED_PARTS:
        raise ValueError(f"{module.label}: llama.cpp's {model.architecture} applies no adapter to such a parameter")
    parts = FUSED_PARTS[module.parameter][0]
    a = module.tensors["a"].reshape(-1, module.rank, module.tensors["a"].shape[1])
    b = module.tensors["b"].reshape(len(parts), -1, module.rank, len(a)).transpose(0, 3, 1, 2)
    return [
        dataclasses.replace(replace_tensors(module, a=a, b=factor), name=_stack_name(module.path, part))
        for part, factor in zip(parts, b)
    ]


def _stack_name(module: str, matrix: str) -> str:
    """llama.cpp's name of a matrix of all experts of a module `model.layers.3.…`."""
    layer = re.search(r"\blayers\.(\d+)\.", module)
    if layer is None:
        raise ValueError(f"{module}: expected the experts of one of the model's layers")
    return f"blk.{layer[1]}.{EXPERT_MATRICES[matrix]}.weight"


def _stack_experts(name: str, modules: dict[int, Module[np.ndarray]], experts: int) -> Module[np.ndarray]:
    """Stacks the factors of experts; those without an adapter get zeros."""
    rank, scales = max(module.rank for module in modules.values()), {module.scale for module in modules.values()}
    padded = {index: pad_module(module, rank) for index, module in modules.items()}
    if len(scales) > 1:
        padded = {index: fold_scale(module, module.scale) for index, module in padded.items()}
    first = next(iter(padded.values()))
    stacked = {
        part: np.stack([padded.get(i, first).tensors[part] * np.float32(i in padded) for i in range(experts)])
        for part in ("a", "b")
    }
    return dataclasses.replace(replace_tensors(first, **stacked), name=name)
