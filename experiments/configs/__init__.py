"""One frozen dataclass a study: a module here is a name that `python -m experiments.run` knows, with dashes.

Each module has `DEFAULTS`, an instance of that dataclass: its fields are the flags, its values what a flag is where it
is left out; and `STUDY`, the module whose `run(config)` does it.
"""
