"""Data sets of papers in the layouts in which they are distributed.

`experiments.input.official.catalog` finds them by name or by their files. A module for each data set reads it.
"""
