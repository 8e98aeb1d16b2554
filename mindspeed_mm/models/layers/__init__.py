"""Layers that model families share, built from megatron-core specs."""
