"""Tables, plots and JSON records of studies."""
