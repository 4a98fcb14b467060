"""Kernels for verification: plain tensors in and out.

``pick``, ``walk``, ``reject``, ``commit`` and ``attention`` hold one op each: a public function, its torch twin
(``*_torch``) and the name of its file in ``cuda/``. Which one runs is decided in ``dispatch``.

With the repository root on ``sys.path``, ``transformers`` imports this folder as the top-level package ``kernels``;
so this file imports nothing heavy, never raises and has no ``__version__``.
"""
