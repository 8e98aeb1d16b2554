"""What the model will see: ``python -m mindspeed_mm.tools.show_data --help``."""
