"""Qwen3-VL built from megatron-core specs. Models know mathematics: no process groups, no devices, no flags."""
