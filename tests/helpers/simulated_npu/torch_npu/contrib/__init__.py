"""Parts of torch_npu that a program imports by name."""
