"""What a compiled step will take on chips that this machine does not have."""
