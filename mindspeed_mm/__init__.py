"""Fine-tuning of Qwen3-VL models on Ascend NPUs, CUDA GPUs and CPUs."""
