"""The only package that names devices and their communication libraries.

``device``   which accelerator this process uses, and what differs between accelerators
``kernels``  implementations of attention, experts, norms and rotary positions, chosen by name
``megatron`` what megatron-core needs to be told before its modules can be built on any device
"""

import importlib.util
import os
import warnings

# megatron-core warns at every import that it runs without Transformer Engine and Apex, which is how it runs here
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")

# Nothing is compiled here, but megatron-core decorates functions for it when it is imported. torch 2.7 answers by
# starting one process for each core, up to 32, beside every training process; for 1 it starts none.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def has_torch_npu() -> bool:
    """Whether torch_npu is installed, found out without importing it."""
    return importlib.util.find_spec("torch_npu") is not None
