"""Kernels for verification: plain tensors in and out.

With the repository root on ``sys.path``, ``transformers`` imports this folder as the top-level package ``kernels``;
so this file imports nothing heavy, never raises and has no ``__version__``.
"""
