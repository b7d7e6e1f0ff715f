"""The curve of the decoder: LoRA by supervised fine-tuning, a run for each learning rate."""

import dataclasses

from rich.console import Console

from experiments.configs import sft
from experiments.configs.lr_sweep import Config
from experiments.models import checkpoint, location
from experiments.studies.decoder.choices import choose_rate
from experiments.studies.lr_sweep.curve import Curve
from experiments.studies.sft import study

_EVAL_SHARE = 0.9  # of the time of training; limits the number of validation examples


def curve(model: str, config: Config, console: Console) -> Curve:
    """Returns the curve, whose runs are trained, resumed or read.

    Args:
      model: The decoder.
      config: The study's config.
      console: The output.

    Raises:
      UserError: See :func:`experiments.studies.sft.study.run`.
    """
    losses, start, seconds = [], 0.0, 0.0
    for rate in config.decoder_rates:
        console.rule(f"{model}, learning rate {rate:g}")
        report = study.run(_run_config(model, config, rate))
        (_, start), *_, (_, last) = report.evaluations
        losses.append(last)
        seconds += report.seconds
    automatic = dataclasses.replace(_run_config(model, config, config.decoder_rates[0]), lr="auto")
    rule = choose_rate(automatic, checkpoint.read_config(location.find(model)))
    name = f"LoRA, rank {sft.DEFAULTS.rank}"
    return Curve(model, name, list(config.decoder_rates), losses, [], [], [], start, rule, seconds)


def _run_config(model: str, config: Config, rate: float) -> sft.Config:
    return dataclasses.replace(
        sft.DEFAULTS,
        model=model,
        data=config.decoder_data,
        lr=rate,
        steps=config.decoder_steps,
        eval_every=config.decoder_steps,
        validation_examples=config.decoder_examples,
        eval_share=_EVAL_SHARE,
        samples=0,
        seed=config.seed,
        out=config.out / f"decoder-lr-{rate:g}",
        fresh=config.fresh,
    )
