"""Where keys and values are kept when rows share memory: blocks, who holds them, and which text they belong to.

Numbers only: no tensors and no models (``specdec.engine.paged_rows`` puts those behind them).
"""
