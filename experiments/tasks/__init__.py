"""Data: what is learned from, how it is read, tokenized and cut into batches."""
