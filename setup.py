"""Packaging: the mindspeed_mm and checkpoint packages and the mm-convert command."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def read_requirements(name: str) -> list[str]:
    """Requirement lines of the file ``name`` in the repository, without comments."""
    lines = (line.split("#")[0].strip() for line in (ROOT / name).read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


setup(
    name="mindspeed-mm",
    version="0.1.0",
    description="Fine-tuning of Qwen3-VL mixture-of-experts models on Ascend NPUs, CUDA GPUs and CPUs",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["mindspeed_mm", "mindspeed_mm.*", "checkpoint", "checkpoint.*"]),
    package_data={"mindspeed_mm.tools": ["*.json"]},
    # torch, torch_npu and megatron-core are installed by scripts/install.sh; requirements.txt says why
    install_requires=read_requirements("requirements.txt"),
    extras_require={
        "example": read_requirements("examples/qwen3vl/requirements.txt"),
        "dev": read_requirements("requirements-dev.txt"),
    },
    entry_points={"console_scripts": ["mm-convert = checkpoint.cli:main"]},
)
