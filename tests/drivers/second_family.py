"""Runs one of the project's commands with the tiny text family registered.

Usage: second_family.py train FLAGS | memory FLAGS | convert HF DCP | export DCP HF ASSETS
"""

from __future__ import annotations

import sys

import tests.families.tiny_text.spec  # noqa: F401


def main() -> int:
    """Pass the arguments to the command."""
    command, words = sys.argv[1], sys.argv[2:]
    sys.argv = [sys.argv[0], *words]
    if command == "train":
        import pretrain_transformers

        return pretrain_transformers.main()
    if command == "memory":
        from mindspeed_mm.tools.memory.__main__ import main as memory

        return memory(words)
    from mindspeed_mm.checkpoint.dcp_to_hf import dcp_to_hf
    from mindspeed_mm.checkpoint.hf_to_dcp import hf_to_dcp

    {"convert": hf_to_dcp, "export": dcp_to_hf}[command](*words)
    return 0


if __name__ == "__main__":
    sys.exit(main())
