"""Configs of studies: a module that defines `DEFAULTS` is a name for `python -m experiments.run`, with dashes.

`DEFAULTS` is an instance of a frozen dataclass: its fields are the flags, its values the defaults. The dataclass names
the module whose `run(config)` executes the study as `STUDY`, and the minutes that it takes on 2 CPU cores as `MINUTES`
(None if they depend on the user).
"""
