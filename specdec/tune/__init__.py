"""Finds the fastest settings for a model and a machine, and the files that hold them."""
