"""torch_npu's operators, under their published signatures, in plain PyTorch.

``signatures.yaml`` has the schemas. Each operator follows its documentation in torch_npu's ``_op_plugin_docs.py`` and
refuses the arguments that it excludes. Where the real library registers a derivative, so does this one, by the
published backward operator: fusion_attention, rms_norm, rotary_mul, swiglu, moe_token_permute and
moe_token_unpermute (autograd nodes of these names are in libtorch_npu.so; there is none for grouped_matmul).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from torch.utils import _pytree as pytree

from torch_npu import _C
from torch_npu._operators import attention, elementwise, moe

SIGNATURES: dict[str, dict[str, str]] = yaml.safe_load(
    Path(__file__).parent.with_name("signatures.yaml").read_text(encoding="utf-8")
)
_MODULES = (attention, elementwise, moe)
_libraries: list[torch.library.Library] = []


def register(version: str) -> list[str]:
    """Register the operators of torch_npu ``version`` as ``torch.ops.npu.*``.

    Returns:
        Their names.
    """
    if version not in SIGNATURES:
        raise ImportError(f"SIMULATED_NPU_VERSION {version} is unknown; choose one of {', '.join(SIGNATURES)}")
    library = torch.library.Library("npu", "DEF")
    _libraries.append(library)
    implementations = {name: function for module in _MODULES for name, function in module.IMPLEMENTATIONS.items()}
    for name, schema in SIGNATURES[version].items():
        library.define(schema)
        library.impl(name, _on_host_memory(implementations[name]), "PrivateUse1")
    aten = torch.library.Library("aten", "IMPL")
    _libraries.append(aten)
    aten.impl("histc", _on_host_memory(_histc), "PrivateUse1")
    for module in _MODULES:
        for name, (backward, setup) in module.DERIVATIVES.items():
            torch.library.register_autograd(f"npu::{name}", backward, setup_context=setup, lib=library)
    return list(SIGNATURES[version])


def _histc(self: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """``histc`` for integers too, which torch's CPU kernel does not support."""
    return torch.histc(self.double(), bins, min, max).to(self.dtype)


def _on_host_memory(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an implementation for CPU tensors to take npu tensors."""

    def lend(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.device.type != "npu":
            raise RuntimeError(f"Expected all tensors to be on the npu, but found one on {value.device}")
        return _C.lend(value)

    def on_npu(*arguments: Any, **keywords: Any) -> Any:
        arguments, keywords = pytree.tree_map(lend, (arguments, keywords))
        with torch.no_grad():
            results = function(*arguments, **keywords)
        return pytree.tree_map(lambda value: _C.take(value) if isinstance(value, Tensor) else value, results)

    return on_npu
