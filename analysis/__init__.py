"""Reads traces and results of ``specdec bench`` and ``specdec tune``; never loads a model.

``load`` makes columns of traces; ``acceptance``, ``speedup`` and ``compare`` compute from them; ``figures`` and
``report`` show them. See docs/analysis.md.
"""
