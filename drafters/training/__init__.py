"""Training of drafters: data from the target itself, Medusa heads, EAGLE-3 cells and distilled draft models."""
