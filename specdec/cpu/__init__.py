"""Faster passes on a CPU: packed linear layers and fused decoder layers."""
