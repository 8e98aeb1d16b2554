"""Kernels of the model's heavy operations; ``registry`` selects one by name when the model is built."""
