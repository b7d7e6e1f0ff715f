"""JAX's internals are used in transform/jaxprs.py only."""

import re
from pathlib import Path

import lora_jax

PACKAGE = Path(lora_jax.__file__).parent
INTERNALS = re.compile(
    r"jax\._src|jax\.extend|jax\.interpreters|from jax import .*\bcore\b|jax\.core\.(?!Tracer\b)|(?:import|from) jaxlib"
)


def test_one_file_uses_the_internals_of_jax():
    files = [path for path in PACKAGE.rglob("*.py") if INTERNALS.search(path.read_text(encoding="utf-8"))]
    assert files == [PACKAGE / "transform" / "jaxprs.py"]
