"""Studies: each `run(config)` is executed by a config of :mod:`experiments.configs`."""
