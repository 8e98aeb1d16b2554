"""LoRA adapters for inference_demo.py; see ``mindspeed_mm.evaluation.adapters``."""

from mindspeed_mm.evaluation.adapters import add_adapter, check_adapter, expert_form, parse_version

__all__ = ["add_adapter", "check_adapter", "expert_form", "parse_version"]
