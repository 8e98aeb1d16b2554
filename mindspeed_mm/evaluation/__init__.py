"""Answers of a model to held-out samples: metrics, generation, and reports as self-contained HTML pages."""
