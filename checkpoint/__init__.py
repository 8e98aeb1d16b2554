"""mm-convert: moves Qwen3-VL weights between Hugging Face directories and distributed checkpoints, bit for bit."""
