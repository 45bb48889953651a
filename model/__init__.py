"""Objectives: a batch in, a loss out. They know networks and the clock, but neither data nor optimizers nor config."""
