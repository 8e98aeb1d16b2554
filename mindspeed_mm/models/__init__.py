"""Model families, built from megatron-core specs. Models are single-device code: no process groups, no flags."""
