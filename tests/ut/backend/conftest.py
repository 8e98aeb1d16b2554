"""What tests of Triton kernels share."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture
def round_to_bf16(monkeypatch):
    """Triton's interpreter truncates to bf16; devices round."""
    if os.environ["TRITON_INTERPRET"] == "0":
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (str(source), str(target)) != ("fp32", "bf16"):
            return convert(values, source, target, mode)
        return torch.tensor(values, dtype=torch.float32).bfloat16().view(torch.uint16).numpy()

    monkeypatch.setattr(interpreter, "_convert_float", rounding)
