"""The only package that names devices and their communication libraries.

``device``         devices behind one interface, and the selection of this process's device
``process_group``  the job's process group and its key-value store
``kernels``        attention, experts, norms and rotary embeddings, selected by name
``megatron``       constants that megatron-core needs before its modules can be built on any device
"""

import importlib.util
import os
import warnings

# megatron-core warns at every import about missing Transformer Engine and Apex, which this project does not use
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")

# megatron-core decorates functions with torch.compile at import, for which torch 2.7 starts up to 32 compiler processes
# per rank; with 1 it starts none.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")


def has_torch_npu() -> bool:
    """Whether torch_npu is installed; does not import it."""
    return importlib.util.find_spec("torch_npu") is not None
