"""Inputs broken at random, and what the programs make of them: ``python -m tests.fuzz --help``."""
