"""Data to text, summaries and SQL with a decoder (LoRA paper, tables 3 and 4)."""
