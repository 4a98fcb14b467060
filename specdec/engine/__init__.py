"""One transformers model as the engine of a decode loop: all rows and all tree nodes in one forward pass."""
