"""MindSpeed's adaptor for megatron-core: the features that are applied on an NPU, if MindSpeed is installed."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from mindspeed_mm.errors import UserError

# The other features patch modules that this project's specs do not use, or need megatron.training, which
# megatron-core's wheel lacks (such as the Transformer Engine feature of MindSpeed's newest commit).
FEATURES = ("RequirementsBasicFeature", "MegatronBasicFeature")
# MindSpeed's adaptor parses sys.argv; it gets these arguments instead of the recipe's, whose FSDP2 flag would make it
# patch megatron.training.
ARGUMENTS = ("--optimizer-selection", "fused_torch_adamw")


def adapt_megatron() -> None:
    """Apply MindSpeed's adaptor with :data:`FEATURES` and :data:`ARGUMENTS`, if MindSpeed is installed.

    Raises:
        UserError: if megatron was imported earlier, so that the adaptor's patches would come too late for it, or if
            this MindSpeed cannot be applied.
    """
    if "mindspeed.megatron_adaptor" in sys.modules or importlib.util.find_spec("mindspeed") is None:
        return
    if "megatron" in sys.modules:
        raise UserError("megatron was imported before the device was applied; MindSpeed's adaptor must come first")
    arguments, sys.argv = sys.argv, [sys.argv[0], *ARGUMENTS]
    try:
        _apply()
    except ImportError as error:
        raise UserError(
            f"MindSpeed cannot be applied ({error}); check out the commit of the guide (bash scripts/install.sh "
            "--msid d76dbddd4517d48a2fc1cd494de8b9a6cfdbfbab), or take MindSpeed off the import path"
        ) from error
    finally:
        sys.argv = arguments


def _apply() -> None:
    from mindspeed.deprecate import NoExecuteFunction

    with NoExecuteFunction():  # importing the adaptor would apply it
        import mindspeed.features_manager as manager
        from mindspeed import megatron_adaptor
    features = manager.create_features_list()
    applied = [feature for feature in features if type(feature).__name__ in FEATURES]
    for feature in features:
        # MindSpeed creates stub packages for Transformer Engine and Apex, so that megatron-core believes they are
        # installed. All features together provide what megatron-core imports from them, so only their patches are off.
        if feature not in applied:
            feature.register_patches = _nothing
    manager.MindSpeedFeaturesManager.set_features_list(features)
    megatron_adaptor.patch_features()
    # every TransformerConfig is checked by all features of the list
    manager.MindSpeedFeaturesManager.set_features_list(applied)


def _nothing(*_: Any) -> None:
    """Replaces a feature's patches."""
