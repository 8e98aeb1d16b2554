"""The only package that names devices and their communication libraries.

``device``   which accelerator this process uses, and what differs between accelerators
``kernels``  implementations of attention, experts, norms and rotary positions, chosen by name
``megatron`` what megatron-core needs to be told before its modules can be built on any device
"""

import warnings

# megatron-core warns at every import that it runs without Transformer Engine and Apex, which is how it runs here
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
