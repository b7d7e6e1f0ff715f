"""The reference has every public name, once."""

import inspect
import re
from collections import Counter

from documentation.pages import DOCS

import lora_jax as lora

MODULES = sorted(name for name in lora.__all__ if inspect.ismodule(getattr(lora, name)))


def entries() -> Counter:
    text = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "reference").glob("*.md"))
    return Counter(re.findall(r"^\.\. auto\w+:: (\S+)$", text, re.MULTILINE))


def public() -> set[str]:
    """The names of the package, and those of its modules that the package itself does not have."""
    names = {f"lora_jax.{name}" for name in lora.__all__ if name not in MODULES}
    top = {name: getattr(lora, name) for name in lora.__all__}
    for module in MODULES:
        members = {name: getattr(getattr(lora, module), name) for name in getattr(lora, module).__all__}
        names |= {f"lora_jax.{module}.{name}" for name, value in members.items() if top.get(name) is not value}
    return names


def test_every_public_name_has_one_entry():
    counts = entries()
    assert sorted(public() ^ counts.keys()) == []
    assert max(counts.values()) == 1


def test_every_module_has_a_page():
    assert [name for name in MODULES if not (DOCS / "reference" / f"{name}.md").exists()] == []
