"""What a config runs, end to end."""
