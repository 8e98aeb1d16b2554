"""Checkpoints: the directory format, and saving and loading of a training state."""
