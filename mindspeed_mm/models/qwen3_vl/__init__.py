"""The Qwen3-VL family, mixture-of-experts and dense."""
