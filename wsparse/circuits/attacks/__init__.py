"""Predictions of when a model fails, read from a circuit, and whether they come true."""
