"""Input of language models: records, their chat template, packed batches that are a function of the step alone."""
