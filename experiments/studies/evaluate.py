"""Scores answers of a base and an adapter to held-out examples."""

import dataclasses

from experiments.configs.evaluate import Config
from experiments.evaluation.scores import Scores
from experiments.input import sources
from experiments.studies.sft import evaluation, held_out, recorded


def run(config: Config) -> list[Scores]:
    """Evaluates what the config names, prints the scores and writes them as JSON; see :func:`evaluation.run`.

    Raises:
      UserError: Model, adapter or data are missing, malformed or incompatible.
    """
    adapter = None if config.adapter is None else recorded.find_adapter(config.adapter)
    names = ("model", "quantize", "dtype", "template", "out", "fresh", "new_tokens", "mesh")
    trained, _ = recorded.restore(adapter, **{name: getattr(config, name) for name in names})
    trained = dataclasses.replace(trained, test_examples=config.test_examples, **vars(config.decoding()))
    named = trained
    if config.data:
        named = dataclasses.replace(
            trained, data=config.data, data_form=config.data_form, validation=(), validation_share=0.0
        )
    train = sources.splits(trained.data, form=trained.data_form)[0] if recorded.is_recorded(adapter) else None
    return evaluation.run(named, held_out.read_named(named, train=train), adapter)
