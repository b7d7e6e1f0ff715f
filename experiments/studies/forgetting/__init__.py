"""What a decoder learns of a new task and forgets of other text, by method."""
