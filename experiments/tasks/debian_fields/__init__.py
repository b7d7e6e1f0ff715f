"""Eight classification tasks on the synopses of Debian packages; see README.md."""
