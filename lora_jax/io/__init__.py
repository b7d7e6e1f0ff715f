"""Files that are replaced atomically, errors of damaged files, Orbax arrays, and termination signals."""
