"""A causal language model adapted to texts that follow a prompt, through every step that an adapter can take."""
