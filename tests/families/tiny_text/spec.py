"""The tiny text family; importing this module registers it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mindspeed_mm.config.checks import ModelFacts
from mindspeed_mm.models.layers.memory import DecoderMemory
from mindspeed_mm.models.memory import Plan, Unit
from mindspeed_mm.models.spec import ModelBuildOptions, ModelSpec, register
from tests.families.tiny_text.config import TinyTextConfig

if TYPE_CHECKING:
    import torch

    from mindspeed_mm.interfaces.batch import Batch
    from mindspeed_mm.interfaces.conversation import ChatTemplate, ChatTemplateOptions
    from mindspeed_mm.interfaces.media import MediaSettings
    from mindspeed_mm.models.lora import Adapter
    from mindspeed_mm.models.model import Model
    from mindspeed_mm.models.state_dict import ExpertLayout, WeightRule


class TinyTextSpec(ModelSpec):
    """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""

    model_types: ClassVar[tuple[str, ...]] = ("tiny_text",)
    collators: ClassVar[tuple[str, ...]] = ("tiny_text",)
    chat_templates: ClassVar[tuple[str, ...]] = ("tiny_text",)
    data_modules: ClassVar[tuple[str, ...]] = ("tests.families.tiny_text.chat_template",)
    parts: ClassVar[Mapping[str, Sequence[str]]] = {"text_decoder": ("decoder.*",)}

    def read_config(self, directory: str | Path) -> TinyTextConfig:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return TinyTextConfig.from_pretrained(directory)

    def facts(self, model_config: TinyTextConfig) -> ModelFacts:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return ModelFacts(
            model_type=model_config.model_type,
            attention_heads={"text": (model_config.num_heads, model_config.num_kv_heads)},
            options={"text_decoder.num_layers": ("n_layers", model_config.num_layers)},
        )

    def describe(self, model_config: TinyTextConfig) -> dict[str, str]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return {"model": f"{model_config.model_type}, {model_config.num_layers} layers"}

    def build_chat_template(self, tokenizer: Any, options: ChatTemplateOptions) -> ChatTemplate:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from tests.families.tiny_text.chat_template import TinyTextTemplate

        self.check_chat_template(options.name, enable_thinking=options.enable_thinking)
        return TinyTextTemplate(tokenizer)

    def build_model(
        self,
        model_config: TinyTextConfig,
        options: ModelBuildOptions,
        *,
        device: str,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        media: MediaSettings | None,
    ) -> Model:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from tests.families.tiny_text.model import build_model

        return build_model(model_config, options, device=device, dtype=dtype, compute_dtype=compute_dtype)

    def weight_rules(self, model_config: TinyTextConfig, *, expert_layout: ExpertLayout) -> list[WeightRule]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from tests.families.tiny_text.state_dict_adapter import weight_rules

        return list(weight_rules(model_config))

    def flop_counter(
        self, model_config: TinyTextConfig, *, frozen: Collection[str], adapters: Sequence[Adapter] = ()
    ) -> Callable[[Batch], float]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        from mindspeed_mm.models.layers.flops import FlopSum, adapted_weights, decoder_flops, segment_lengths

        def count(batch: Batch) -> float:
            flops, lengths = FlopSum(adapted_weights(adapters)), segment_lengths(batch.cu_seqlens_host)
            decoder_flops(
                flops, model_config, lengths, prefix="decoder", target_tokens=batch.num_target_tokens,
                trains="text_decoder" not in frozen,
            )  # fmt: skip
            return flops.total / 1e12

        return count

    def memory_units(self, plan: Plan) -> list[Unit]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        decoder = _decoder(plan)
        parameters = tuple(decoder.root_parameters())
        return [
            Unit(name="final norm", kind="root", parameters=parameters, shards=plan.sharding_size),
            *decoder.units(),
        ]

    def memory_exchanges(self, plan: Plan) -> dict[str, float]:
        """See :class:`~mindspeed_mm.models.spec.ModelSpec`."""
        return _decoder(plan).exchanges()


def _decoder(plan: Plan) -> DecoderMemory:
    return DecoderMemory(plan=plan, config=plan.model_config, prefix="decoder", trains=True, runs_backward=True)


SPEC = register(TinyTextSpec())
