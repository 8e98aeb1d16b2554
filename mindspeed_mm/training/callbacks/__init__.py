"""Callbacks: log line, metrics file, evaluation, checkpointing, profiling, watchdog, anomaly detection."""
