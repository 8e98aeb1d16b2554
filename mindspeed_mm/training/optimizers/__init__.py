"""Optimizers over sharded parameters; each steps where a device scalar says so, and allocates its state on request."""
