"""Models, studies, benchmarks and compilation for pods, with :mod:`lora_jax`."""

import sys

from experiments.renamed import FormerModules

sys.meta_path.append(FormerModules)
