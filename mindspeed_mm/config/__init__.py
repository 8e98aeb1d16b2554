"""The typed schema of all options: launcher flags, and the JSON and YAML files they name. Imports no torch."""
