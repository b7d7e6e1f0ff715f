"""One base, many tasks: adapters that train in one step and answer in one batch, next to full models."""
