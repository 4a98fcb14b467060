"""Reads traces and benchmark results; never loads a model."""
