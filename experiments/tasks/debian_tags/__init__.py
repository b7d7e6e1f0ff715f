"""Tags of Debian packages and their synopses; see README.md."""
