"""Data: what is learnt from, how it is read, tokenised and cut into batches."""
