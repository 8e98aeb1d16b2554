"""Generate demo data: labelled scenes with true answers, in the formats of several trainers."""
