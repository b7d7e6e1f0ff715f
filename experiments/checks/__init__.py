"""Checks that need packages outside of this project's dependencies. They are run manually."""
