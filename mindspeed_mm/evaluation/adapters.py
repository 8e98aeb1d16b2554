"""LoRA adapters by PEFT: what the installed version would misread is refused before the model is loaded."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_file, reading
from mindspeed_mm.models.spec import spec_of

# --format of mm-convert ... lora_to_hf -> layout of the experts' factors that it writes
_EXPERT_LAYOUTS = {"peft": "canonical", "peft-transformers4": "swapped"}


def check_adapter(adapter: str, model: str, *, converter: str = "CONVERTER") -> None:
    """Check that the installed PEFT can add the adapters to the model.

    Args:
        adapter: PEFT directory.
        model: Hugging Face directory of the model.
        converter: name of mm-convert's converter, for the remedy.

    Raises:
        UserError: if PEFT is missing, the adapters are damaged or another model's, or their experts' factors lie in the
            order of other versions of PEFT and transformers.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError("--adapter needs the package peft; run: pip install -r examples/qwen3vl/requirements.txt")
    if not is_file(Path(adapter) / "adapter_config.json"):
        raise UserError(
            f"--adapter {adapter} has no adapter_config.json; name a PEFT directory, such as "
            "save_dir_lora/iter_0001000/adapter"
        )
    from mindspeed_mm.checkpoint.adapters import AdapterDirectory  # imports torch

    spec = spec_of(model)
    source = AdapterDirectory(Path(adapter), spec, spec.read_config(model))
    experts = source.experts
    if os.path.isdir(source.base) and not os.path.samefile(source.base, model):
        print(f"note: --adapter {adapter} was trained over {source.base}, not over --model {model}", file=sys.stderr)
    versions = {name: importlib.metadata.version(name) for name in ("peft", "transformers")}
    form = expert_form(**versions)
    if experts and experts != _EXPERT_LAYOUTS[form]:
        raise UserError(
            f"--adapter {adapter}: the experts' factors are in the {experts} layout, and peft {versions['peft']} with "
            f"transformers {versions['transformers']} reads {_EXPERT_LAYOUTS[form]} ones; convert them: mm-convert "
            f"{converter} lora_to_hf --load_dir {adapter} --hf_dir {model} --save_dir DIR --format {form}"
        )


def expert_form(*, peft: str, transformers: str) -> str:
    """The ``--format`` of ``mm-convert ... lora_to_hf`` that these versions read experts' adapters in.

    PEFT takes inputs and outputs of a weight from its axes, which transformers 5 exchanged, and PEFT 0.19.1 did, too.
    """
    exchanged = parse_version(peft) >= (0, 19, 1)
    return "peft" if exchanged == (parse_version(transformers) >= (5,)) else "peft-transformers4"


def parse_version(version: str) -> tuple[int, ...]:
    """The numbers of a version's release: 0.19.1.dev0 -> (0, 19, 1)."""
    release = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, release.group().split("."))) if release else ()


def add_adapter(model: Any, adapter: str) -> None:
    """Add the adapters to the model, in place.

    Raises:
        UserError: if PEFT cannot, or leaves some of them out.
    """
    import peft
    from safetensors import safe_open

    with reading(f"--adapter {adapter}", "convert it with mm-convert lora_to_hf"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of ranks of their own for experts, which PEFT then honours
            adapted = peft.PeftModel.from_pretrained(model, adapter, is_trainable=False, local_files_only=True)
        with safe_open(Path(adapter) / "adapter_model.safetensors", framework="pt") as file:
            stored = len(file.keys())
        added = sum(".lora_A." in name or ".lora_B." in name for name, _ in adapted.named_parameters())
        if added != stored:
            raise ValueError(f"it has {stored} factors, and PEFT made {added} of the model's")
