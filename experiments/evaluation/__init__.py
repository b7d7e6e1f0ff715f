"""Answers of a model to held-out examples, and their scores."""
