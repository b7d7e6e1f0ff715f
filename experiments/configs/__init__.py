"""One frozen dataclass a study: a module here is a name that `python -m experiments.run` knows.

Each module has `Config`, whose fields are the study's flags, and `STUDY`, the module whose `run(config)` does
it.
"""
