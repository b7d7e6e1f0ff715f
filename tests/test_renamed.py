"""Former names raise errors that state the new ones."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

import experiments.renamed
import lora_jax
from lora_jax import renamed

ROOT = Path(lora_jax.__file__).parents[1]

MODULES = {name: new.partition(";")[0] for name, new in renamed.MODULES.items()} | {
    name: new for name, new in experiments.renamed.NAMES.items() if "." in new
}

ATTRIBUTES = {
    "lora_jax.adapters.adalora.SingularTriplets": "AdaLoRAAdapter",
    "lora_jax.adapters.dora.WeightDecomposed": "DoRAAdapter",
    "lora_jax.adapters.full.Replacement": "FullAdapter",
    "lora_jax.adapters.full.RowReplacement": "RowsAdapter",
    "lora_jax.adapters.ia3.Rescaled": "IA3Adapter",
    "lora_jax.adapters.loha.HadamardProduct": "LoHaAdapter",
    "lora_jax.adapters.lokr.FullKronecker": "LoKrFullAdapter",
    "lora_jax.adapters.lokr.LowRankKronecker": "LoKrAdapter",
    "lora_jax.adapters.lora_fa.FrozenA": "LoRAFAAdapter",
    "lora_jax.adapters.lowrank.LowRank": "LoRAAdapter",
    "lora_jax.adapters.offset.Addition": "OffsetAdapter",
    "lora_jax.adapters.vera.DecomposedPair": "DVoRAAdapter",
    "lora_jax.adapters.vera.ScaledPair": "VeRAAdapter",
    "lora_jax.initializers.Given": "Target",
    "lora_jax.initializers.Informed": "Calibrated",
    "lora_jax.initializers.Reading": "Statistics",
    "lora_jax.initializers.Start": "Factors",
    "lora_jax.initializers.find": "get_initializer",
    "lora_jax.initializers.initializer.Given": "Target",
    "lora_jax.initializers.initializer.Informed": "Calibrated",
    "lora_jax.initializers.initializer.Reading": "Statistics",
    "lora_jax.initializers.initializer.Start": "Factors",
    "lora_jax.manifest.BasePrecisionWarning": "lora_jax.BasePrecisionWarning",
    "lora_jax.paths.assigned": "match_patterns",
    "lora_jax.paths.compiles": "check_pattern",
    "lora_jax.peft.Place": "Binding",
    "lora_jax.peft.names.Place": "lora_jax.peft.Binding",
    "lora_jax.quantization.bitsandbytes.four_bit_tensors": "bitsandbytes_tensors",
    "lora_jax.quantization.four_bit_tensors": "bitsandbytes_tensors",
} | {name: new for name, new in experiments.renamed.NAMES.items() if "." not in new}

MEMBERS = {
    "lora_jax.Adapter.layout": "labels",
    "lora_jax.Adapter.neutral": "identity_like",
    "lora_jax.Adapter.padded": "pad_rank",
    "lora_jax.LoRA.informed": "with_calibration",
    "lora_jax.LoRA.make": "create",
    "lora_jax.Recipe.informed": "with_calibration",
    "lora_jax.Recipe.make": "create",
    "lora_jax.initializers.Initializer.distributed": "allocate_ranks",
    "lora_jax.initializers.Initializer.start": "make_factors",
    "lora_jax.initializers.PiSSA.start": "make_factors",
    "lora_jax.optim.AllocationState.kept": "active",
    "lora_jax.peft.Binding.left": "leaf_axes",
    "lora_jax.peft.Binding.right": "tensor_axes",
    "lora_jax.peft.Binding.running": "index_labels",
    "lora_jax.peft.Names.in_files": "with_file_names",
    "lora_jax.peft.Names.place": "get",
    "lora_jax.quantization.Quantized.place": "block_axis",
    "lora_jax.quantization.Scales.decoded": "decode",
}


def sentence(name: str, new: str) -> str:
    return re.escape(f"{name} has been renamed to {new}")


@pytest.mark.parametrize(("name", "new"), sorted(MODULES.items()))
def test_a_former_module_states_the_new_one(name, new):
    package, _, module = name.rpartition(".")
    imports = [f"import {name}", f"import {name} as module", f"from {name} import name"]
    for statement in [*imports, f"import {name}.module", f"from {package} import {module}"]:
        if statement == "from lora_jax import quantize":  # the function
            continue
        with pytest.raises(ImportError, match=sentence(name, new)):
            exec(statement, {})
    with pytest.raises(ModuleNotFoundError, match=sentence(name, new)):
        importlib.import_module(name)
    assert importlib.util.find_spec(new)


@pytest.mark.parametrize("name", sorted(renamed.MODULES.keys() - {"lora_jax.quantize"}))
def test_a_former_module_as_an_attribute_states_the_new_one(name):
    package, _, module = name.rpartition(".")
    with pytest.raises(AttributeError, match=sentence(name, renamed.MODULES[name])):
        getattr(importlib.import_module(package), module)


@pytest.mark.parametrize(("name", "new"), sorted(ATTRIBUTES.items()))
def test_a_former_name_in_a_module_states_the_new_one(name, new):
    path, _, attribute = name.rpartition(".")
    module = importlib.import_module(path)
    with pytest.raises(AttributeError, match=sentence(name, new)):
        getattr(module, attribute)
    with pytest.raises(ImportError, match=sentence(name, new)):
        exec(f"from {path} import {attribute}", {})
    assert not hasattr(module, attribute)
    new_module, _, new_attribute = new.rpartition(".")
    assert hasattr(importlib.import_module(new_module or path), new_attribute)


@pytest.mark.parametrize(("name", "new"), sorted(MEMBERS.items()))
def test_a_former_member_of_a_class_states_the_new_one(name, new):
    path, _, member = name.rpartition(".")
    module, _, cls = path.rpartition(".")
    owner = getattr(importlib.import_module(module), cls)
    for receiver in (owner, object.__new__(owner) if owner is lora_jax.LoRA else owner):
        with pytest.raises(AttributeError, match=sentence(f"{cls}.{member}", new)):
            getattr(receiver, member)
    assert hasattr(owner, new) or new in owner.__dataclass_fields__


@pytest.mark.parametrize("module", ["lora_jax", "lora_jax.peft", "lora_jax.paths", "experiments.models.rope"])
def test_a_name_that_never_was_keeps_the_ordinary_error(module):
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'unknown'"):
        _ = importlib.import_module(module).unknown
    with pytest.raises(ImportError, match="cannot import name 'unknown'"):
        exec(f"from {module} import unknown", {})
    with pytest.raises(ModuleNotFoundError, match=f"No module named '{module}.unknown'"):
        importlib.import_module(f"{module}.unknown")


@pytest.mark.parametrize(
    "statement", ["import experiments.ahead.report", "from experiments.ahead import report", "import experiments.ahead"]
)
def test_a_former_module_states_the_new_one_before_the_library_is_imported(statement):
    run = subprocess.run([sys.executable, "-c", statement], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: experiments.ahead has been renamed to experiments.aot." in run.stderr


def test_every_former_name_in_the_changelog_is_tested():
    """Words in the first column of the table; those with a dot, or a capital, are names."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = [line for line in text.split("### Renamed")[1].split("\n### ")[0].splitlines() if line.startswith("| ")][1:]
    tested = [*renamed.MODULES, *experiments.renamed.NAMES, *ATTRIBUTES, *MEMBERS]
    rows = [row for row in rows if not row.startswith("| `explain`")]  # an operation's name in a report
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row.split(" | ")[0])]
    assert len(names) > 30
    for name in names:
        module = {"capturing.capture": "capturing", "transform.deferred.Deferred": "transform.deferred"}.get(name, name)
        assert any(f".{former}".endswith(f".{module}") for former in tested), name
