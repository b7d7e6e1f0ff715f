"""Debian packages' long descriptions and synopses as conversations of one turn; see README.md."""
