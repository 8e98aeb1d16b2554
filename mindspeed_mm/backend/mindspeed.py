"""MindSpeed's adaptor: what it may change in megatron-core, on an NPU, where MindSpeed is installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from mindspeed_mm.errors import UserError

# The features that are applied. Those left out replace modules that this project's specs do not use, or, like that of
# Transformer Engine in MindSpeed's newest state, need megatron.training, which megatron-core's wheel lacks.
FEATURES = ("RequirementsBasicFeature", "MegatronBasicFeature")
# What MindSpeed's adaptor reads from the command line, in the place of the recipe's flags: told of FSDP2 it would patch
# megatron.training.
ARGUMENTS = ("--optimizer-selection", "fused_torch_adamw")


def adapt_megatron() -> None:
    """Apply MindSpeed's adaptor with chosen features and arguments, where MindSpeed is installed.

    Raises:
        UserError: if megatron was imported earlier, so that the adaptor's patches would come too late for it, or if
            this MindSpeed cannot be applied.
    """
    if "mindspeed.megatron_adaptor" in sys.modules or importlib.util.find_spec("mindspeed") is None:
        return
    if "megatron" in sys.modules:
        raise UserError("megatron was imported before the device was chosen; MindSpeed's adaptor must come first")
    words, sys.argv = sys.argv, [sys.argv[0], *ARGUMENTS]
    try:
        _apply()
    except ImportError as error:
        raise UserError(
            f"MindSpeed cannot be applied ({error}); check out the commit of the guide (bash scripts/install.sh "
            "--msid d76dbddd4517d48a2fc1cd494de8b9a6cfdbfbab), or take MindSpeed off the import path"
        ) from error
    finally:
        sys.argv = words


def _apply() -> None:
    from mindspeed.deprecate import NoExecuteFunction

    with NoExecuteFunction():  # importing the adaptor applies it, unless it is told not to
        import mindspeed.features_manager as manager
        from mindspeed import megatron_adaptor
    features = manager.create_features_list()
    chosen = [feature for feature in features if type(feature).__name__ in FEATURES]
    for feature in features:
        # MindSpeed makes packages of the names of Transformer Engine and Apex, so that megatron-core takes these for
        # present; what it imports from them must be there then, whichever feature provides it.
        if feature not in chosen:
            feature.register_patches = _nothing
    manager.MindSpeedFeaturesManager.set_features_list(features)
    megatron_adaptor.patch_features()
    # every TransformerConfig is checked by all features of the list
    manager.MindSpeedFeaturesManager.set_features_list(chosen)


def _nothing(*_: Any) -> None:
    """In the place of a feature's patches."""
