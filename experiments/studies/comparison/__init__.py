"""What the comparisons of methods share: their description, their runs, and their table, figure and record."""
