"""Circuits in a browser: one page of HTML from the folders of circuits, without jax or a model."""
