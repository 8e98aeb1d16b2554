"""Import and set-up of megatron-core 0.12.1, so that its modules can be built on any device."""

from __future__ import annotations

from unittest import mock

import torch

from mindspeed_mm.errors import UserError

SUPPORTED_VERSION = "0.12.1"

# megatron-core decorates its fused functions with torch.compile at import, which loads the compiler and adds a second
# to every start. This project's specs use none of them.
with mock.patch.object(torch, "compile", lambda function=None, **_: function or (lambda decorated: decorated)):
    import megatron.core.fusions.fused_bias_dropout
    import megatron.core.transformer.transformer_layer  # noqa: F401


def prepare_megatron() -> None:
    """Set tensor and pipeline parallel sizes to 1. Idempotent.

    megatron-core's layers read these sizes while they are built. This project applies sharding afterwards, from
    outside, so the sizes are constants and models can be built without a process group.

    Raises:
        UserError: if another megatron-core than 0.12.1 is installed, the one version that MindSpeed supports.
    """
    from megatron.core import package_info, parallel_state

    version = package_info.__version__
    if version.split("+")[0] != SUPPORTED_VERSION:
        raise UserError(
            f"megatron-core {version} is installed; this project needs {SUPPORTED_VERSION}: "
            f"pip install --no-deps megatron-core=={SUPPORTED_VERSION}"
        )
    parallel_state.set_tensor_model_parallel_world_size(1)
    parallel_state.set_tensor_model_parallel_rank(0)
    parallel_state.set_pipeline_model_parallel_world_size(1)
    parallel_state.set_pipeline_model_parallel_rank(0)
