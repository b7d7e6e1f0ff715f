"""Compiles the training step of a config for a TPU slice, and analyzes it."""

from collections.abc import Sequence

from experiments import flags
from experiments.aot import fitting
from experiments.aot.analysis import Analysis, DoesNotFit, analyze
from experiments.aot.topology import Topology
from experiments.command_line import find_config
from experiments.configs.sft import Config
from experiments.errors import UserError
from experiments.models.flops import count_flops
from experiments.studies.sft import program

PROGRAM = "python -m experiments.compile_for_pod"


def parse_config(name: str, overrides: Sequence[str]) -> Config:
    """Returns the config of a name with the overrides of a command line.

    Raises:
      UserError: No config has this name, it is not a config of supervised fine-tuning, or its fields contradict each
        other.
    """
    module = find_config(name)
    if not isinstance(module.DEFAULTS, Config):
        raise UserError(f"{name} has no step for a pod; configs of supervised fine-tuning have one, such as sft")
    try:
        return flags.parse(module.DEFAULTS, f"{PROGRAM} {name}", overrides)
    except ValueError as error:
        raise UserError(str(error)) from None


def compile_config(config: Config, topology: Topology) -> Analysis:
    """Compiles the step of a config for a slice and returns its analysis.

    Raises:
      UserError: The mesh of the config does not have as many devices as the slice.
      DoesNotFit: The step does not fit the chips; the exception's `advice` says what would.
    """
    chips, mesh = len(topology.devices), config.mesh
    if mesh.count != chips:
        data, rest = divmod(chips, mesh.fsdp * mesh.tensor)
        hint = f"--mesh.data {data} fits" if data and not rest else f"choose sizes whose product is {chips}"
        raise UserError(f"the mesh ({mesh}) has {mesh.count} devices, {topology.name} has {chips} chips; {hint}")
    step = program.abstract(config, topology.devices, "tpu")
    flops = count_flops(step.base, step.delta, step.shape, config.row_length)
    model_flops = step.tokens * (flops.token + flops.label)  # as if each token had a label
    try:
        analysis = analyze(step, topology, model_flops)
        if analysis.memory.total > analysis.memory.capacity:
            raise DoesNotFit(analysis.memory.total, analysis.memory.capacity)
    except DoesNotFit as error:
        advice = fitting.advice(config, topology.devices, error.needed, error.available)
        raise DoesNotFit(error.needed, error.available, f"the step {error}: {advice}") from error
    return analysis
