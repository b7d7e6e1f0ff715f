"""A decoder fine-tuned on conversations, on the checkpoint's own chat template: from a laptop to a pod."""

from experiments.studies.sft.config import Config

STUDY = "experiments.studies.sft.study"
DEFAULTS = Config()
