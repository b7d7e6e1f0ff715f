"""Checks that need packages which this project does not depend on; run by hand."""
