"""Preferences: the true synopsis of a Debian package rather than that of a sibling; see README.md."""
