"""Adapters: what is trained beside, or in place of, a frozen weight. One file a family."""
