"""Estimates the memory and time of a compiled step on chips that are not attached."""
