"""Configs of fine-tuning runs on TPU slices and GPU nodes; as in `experiments.configs`, a module is a name."""
