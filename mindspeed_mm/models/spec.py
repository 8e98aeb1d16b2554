"""Model families: everything that the rest of the package asks of one, and the registry by ``model_type``.

A family is one folder below ``mindspeed_mm/models`` with one subclass of :class:`ModelSpec`. Other packages take the
spec and never name a family. This module imports no torch; a spec's methods import what they need when called.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from mindspeed_mm.config.flags import TrainingArgs
from mindspeed_mm.config.model_options import ModelOptions
from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import shorten
from mindspeed_mm.models.layers.config import read_config_json
from mindspeed_mm.models.lora import Adapter, Groups, LoraOptions, lora_settings, plan_adapters
from mindspeed_mm.models.parameter_rules import ParameterInfo, ParameterRule, Settings, resolve, with_muon

if TYPE_CHECKING:
    import numpy as np
    import torch

    from mindspeed_mm.config.checks import ModelFacts
    from mindspeed_mm.config.data_config import DataConfig
    from mindspeed_mm.interfaces.batch import Batch, VisionBatch
    from mindspeed_mm.interfaces.conversation import ChatTemplate, ChatTemplateOptions
    from mindspeed_mm.interfaces.media import GridTHW, MediaPatches, MediaSettings
    from mindspeed_mm.models.matrices import Matrices
    from mindspeed_mm.models.memory import Plan, Unit
    from mindspeed_mm.models.model import Model
    from mindspeed_mm.models.state_dict import ExpertLayout, WeightRule

_BUILT_IN: dict[str, str] = {
    "qwen3_vl": "mindspeed_mm.models.qwen3_vl.spec",
    "qwen3_vl_moe": "mindspeed_mm.models.qwen3_vl.spec",
}
"""``model_type`` -> module whose import registers the family."""
_REGISTERED: dict[str, ModelSpec] = {}


class ModelConfig(Protocol):
    """What the config of every family has; it is a frozen dataclass."""

    @property
    def model_type(self) -> str:
        """As in ``config.json``."""

    @property
    def vocab_size(self) -> int:
        """Rows of the word embeddings."""

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the output layer is the word embeddings."""

    @property
    def initializer_range(self) -> float:
        """Standard deviation of initial weights."""

    @property
    def num_experts(self) -> int:
        """Experts of a sparse layer; 0 in a dense model."""

    @property
    def num_experts_per_token(self) -> int:
        """Experts that a token goes to."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelBuildOptions:
    """What a user may choose about a model of a given config.

    Attributes:
        text_attn_implementation: name of the text attention; None for the device's best.
        vision_attn_implementation: likewise for vision.
        fused_experts: grouped expert products instead of the reference loop.
        loss_chunk_size: target tokens whose logits exist at a time; None for all.
        recompute_granularity: ``full`` or ``selective``, for vision blocks that train and for decoder layers; see
            :class:`~mindspeed_mm.models.layers.activation_checkpoint.ActivationCheckpointPolicy`.
        recompute_method: of ``full``; ``uniform`` or ``block``.
        recompute_num_layers: of ``full``.
        activation_offload: keep on the host what the decoder layers keep for backward.
        vision_synchronize_per_layer: wait for the device after each vision block.
        text_synchronize_per_layer: wait for the device after each decoder layer.
        router_load: return the routers' probabilities too, which the load-balancing loss is made of.
        compile_small_operators: norms, rotary positions and SwiGLU of grouped experts by torch.compile.
        triton_kernels: Triton kernels on a CUDA GPU that runs them.
    """

    text_attn_implementation: str | None = None
    vision_attn_implementation: str | None = None
    fused_experts: bool = True
    loss_chunk_size: int | None = None
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] = "uniform"
    recompute_num_layers: int = 1
    activation_offload: bool = False
    vision_synchronize_per_layer: bool = False
    text_synchronize_per_layer: bool = False
    router_load: bool = False
    compile_small_operators: bool = False
    triton_kernels: bool = True

    @classmethod
    def from_config(cls, args: TrainingArgs, model: ModelOptions, *, router_load: bool) -> ModelBuildOptions:
        """The choices of flags and model file."""
        vision, text = model.image_encoder.vision_encoder, model.text_decoder
        return cls(
            text_attn_implementation=text.attn_implementation,
            vision_attn_implementation=vision.attn_implementation,
            fused_experts=text.use_npu_fused_moe,
            loss_chunk_size=model.loss_chunk_size,
            recompute_granularity=args.recompute_granularity,
            recompute_method=args.recompute_method,
            recompute_num_layers=args.recompute_num_layers,
            activation_offload=model.activation_offload,
            vision_synchronize_per_layer=vision.synchronize_per_layer,
            text_synchronize_per_layer=text.synchronize_per_layer,
            router_load=router_load,
            compile_small_operators=args.compile_small_operators,
            triton_kernels=not args.no_triton_kernels,
        )


@dataclasses.dataclass(frozen=True)
class ServingFacts:
    """Facts of a family by which ``mm-convert check_hf`` judges a directory.

    Attributes:
        architecture: the class that ``architectures`` in ``config.json`` names.
        end_of_answer: token that ends an answer in the chat format; None if that cannot be checked.
        end_of_text: token that ends a document, at which generation should stop as well; None for none.
        transformers4_fields: fields of ``config.json``, without which transformers 4 cannot load the model or assumes
            another value than transformers 5, with a dot between levels.
        media_tokens: kind of media -> placeholder that the chat template writes.
        name_pattern: regular expression that lmms-eval searches in the directory's path to choose the model's class;
            None if it does not.
        named: whether the path must match ``name_pattern``; otherwise it must not.
    """

    architecture: str | None = None
    end_of_answer: str | None = None
    end_of_text: str | None = None
    transformers4_fields: tuple[str, ...] = ()
    media_tokens: dict[str, str] = dataclasses.field(default_factory=dict)
    name_pattern: str | None = None
    named: bool = False


class ModelSpec(abc.ABC):
    """One model family; ``model_config`` is what :meth:`read_config` returns.

    What concerns images and videos has defaults for a family that takes text only.

    Attributes:
        model_types: values of ``model_type`` in ``config.json`` that the family reads.
        collators: names that ``collate_param.model_name`` may have for it.
        chat_templates: names that ``template`` may have for it.
        thinking_templates: those of ``chat_templates`` that ``enable_thinking`` works with. Without ``enable_thinking``
            they remove thoughts from answers; other templates leave them in.
        data_modules: modules that decide how records become tokens; a data cache is rebuilt when one of them changes.
        chat_tokens: special tokens that start and end a turn, which a tokenizer of the family must know.
        media_kinds: media that the family takes, of ``image`` and ``video``.
        box_scale: what the width and the height of an image are in the coordinates of boxes; None if there are none.
        parts: name of a part of the model that can be frozen by itself -> globs of its parameters' names.
        adapter_groups: name of a group of weights that LoRA can adapt -> globs of their Hugging Face names.
        weight_map_version: rises whenever a name, a shape or the order of rows of a parameter changes.
    """

    model_types: ClassVar[tuple[str, ...]]
    collators: ClassVar[tuple[str, ...]]
    chat_templates: ClassVar[tuple[str, ...]]
    thinking_templates: ClassVar[tuple[str, ...]] = ()
    data_modules: ClassVar[tuple[str, ...]]
    chat_tokens: ClassVar[tuple[str, ...]] = ()
    media_kinds: ClassVar[tuple[str, ...]] = ()
    box_scale: ClassVar[int | None] = None
    parts: ClassVar[Mapping[str, Sequence[str]]]
    adapter_groups: ClassVar[Groups] = {}
    weight_map_version: ClassVar[int] = 1

    @abc.abstractmethod
    def read_config(self, directory: str | Path) -> Any:
        """The model config (see :class:`ModelConfig`) of a Hugging Face directory.

        Raises:
            UserError: if ``config.json`` is missing or cannot be trained.
        """

    @abc.abstractmethod
    def facts(self, model_config: Any) -> ModelFacts:
        """What the rules between options and model read of a config from :meth:`read_config`."""

    def check_data_config(self, config: DataConfig) -> None:
        """Check the names by which the data file chooses a chat template and a collator.

        Raises:
            UserError: naming the field, its value, and the family's names.
        """
        basic, collator = config.dataset_param.basic_parameters, config.dataloader_param.collate_param.model_name
        self.check_chat_template(basic.template or self.chat_templates[0], enable_thinking=basic.enable_thinking)
        if collator is not None and collator not in self.collators:
            raise UserError(
                f"--mm-data: dataloader_param.collate_param.model_name {collator!r} is unknown for this model; choose "
                f"{' or '.join(self.collators)}"
            )

    def check_chat_template(self, name: str, *, enable_thinking: bool) -> None:
        """Refuse a template that is unknown or cannot do what the data file asks.

        Raises:
            UserError: naming the family's templates.
        """
        if name not in self.chat_templates:
            choice = " or ".join(self.chat_templates)
            raise UserError(f"--mm-data: basic_parameters.template {name!r} is unknown for this model; choose {choice}")
        if enable_thinking and name not in self.thinking_templates:
            remedy = f"choose {' or '.join(self.thinking_templates)}" if self.thinking_templates else "set it to false"
            raise UserError(
                f"--mm-data: basic_parameters.enable_thinking is true, but template {name} has no thinking part; "
                f"{remedy}"
            )

    @abc.abstractmethod
    def build_chat_template(self, tokenizer: Any, options: ChatTemplateOptions) -> ChatTemplate:
        """The chat template for ``tokenizer``, a fast tokenizer of transformers.

        Raises:
            UserError: for options that ``check_chat_template`` refuses, or a tokenizer of another model.
        """

    def control_token_finder(self) -> Callable[[str], str] | None:
        """A function that gives the first control token of the chat format written out in a message, or an empty text.

        None for a family whose templates do not encode such tokens as plain text.
        """
        return None

    def box_text(self, box: Sequence[int], *, special_tokens: bool) -> str:
        """A box ``[x1, y1, x2, y2]`` or a point ``[x, y]``, in units of ``box_scale``, as the model writes it."""
        raise NotImplementedError

    def ref_text(self, name: str, *, special_tokens: bool) -> str:
        """The name of an object that a box belongs to, as the model writes it."""
        raise NotImplementedError

    def boxes_in(self, text: str) -> list[list[float]]:
        """Boxes and points that a text holds, in units of ``box_scale``."""
        return []

    def tool_call_text(self, content: str) -> str:
        """The answer that calls tools, from JSON: ``{"name": ..., "arguments": ...}`` or a list of these.

        Raises:
            ValueError: if ``content`` is something else, or the family has no format for tool calls.
        """
        raise ValueError("this model has no format for tool calls")

    def tools_text(self, tools: Sequence[Any], system: str | None) -> str:
        """The system message that describes the tools, after its own text ``system``, if there is one.

        Raises:
            ValueError: if the family has no format for tools.
        """
        raise ValueError("this model has no format for descriptions of tools")

    def read_media_settings(self, config: DataConfig, model_config: Any) -> MediaSettings | None:
        """Sizes and normalisation of images and videos, by the data file and the checkpoint's processor files.

        Read once per run; data and model both take them. None for a family that takes text only.

        Raises:
            UserError: if a processor file is missing, or contradicts the data file or the model.
        """
        del config, model_config
        return None

    def load_image_processor(self, directory: str | Path) -> Any:
        """The image processor of transformers for a model directory, for generation; without torchvision.

        Raises:
            Exception: of transformers, if it cannot be loaded.
        """
        raise NotImplementedError

    def ignored_settings(self, directory: Path, config: DataConfig) -> list[str]:
        """Lines that name settings of a model directory from which a user may expect an effect that they do not have.

        Args:
            directory: of the model, which :meth:`read_config` accepts.
            config: the data file, whose processor files :meth:`read_media_settings` accepts.

        Raises:
            UserError: if a file cannot be read.
        """
        del directory, config
        return []

    def with_trained_limits(
        self, directory: Path, trained: Mapping[str, Any], *, source: str
    ) -> tuple[dict[str, dict[str, Any]], list[str]]:
        """Processor files of a model with the limits of its training's images and videos.

        Args:
            directory: Hugging Face directory with the files.
            trained: :meth:`read_media_settings` of the training, as a manifest has them.
            source: names ``trained``, for messages.

        Returns:
            Name -> content of each JSON file that has other limits, and each change as ``file: field old -> new``.

        Raises:
            UserError: if ``trained`` or a file holds values that such limits cannot have.
        """
        del directory, trained, source
        return {}, []

    def serving_facts(self, model_config: Any) -> ServingFacts:
        """What servers and evaluators need of a directory of this family; nothing is checked by default."""
        del model_config
        return ServingFacts()

    def check_processors(self, directory: Path, model_config: Any) -> None:
        """Check that the processor files of a Hugging Face directory are those of its model.

        Raises:
            UserError: naming the file that is missing or damaged, or the field that contradicts the model.
        """
        del directory, model_config

    def special_token_ids(self, model_config: Any) -> dict[str, tuple[str, int]]:
        """Field of ``config.json`` -> special token of the chat format and its id, which must be the tokenizer's."""
        del model_config
        return {}

    def placeholder_token_ids(self, model_config: Any) -> tuple[int, ...]:
        """Ids of the tokens that merged vision patches replace."""
        del model_config
        return ()

    def token_positions(self, is_placeholder: np.ndarray, grids: Sequence[GridTHW], model_config: Any) -> np.ndarray:
        """Positions of one sample's tokens on the three axes time, height and width.

        Args:
            is_placeholder: bool [L], tokens whose id is among ``placeholder_token_ids``.
            grids: the sample's images and videos in order.
            model_config: of this family.

        Returns:
            int64 [3, L]; without vision the token's index on each axis.

        Raises:
            ValueError: if the placeholders do not match the grids.
        """
        import numpy as np

        del model_config
        if len(grids):
            raise ValueError(f"it has {len(grids)} images or videos, and this model takes text only")
        return np.broadcast_to(np.arange(len(is_placeholder), dtype=np.int64), (3, len(is_placeholder)))

    def collate_vision(
        self, media: Sequence[MediaPatches], placeholder_index: np.ndarray, model_config: Any
    ) -> VisionBatch | None:
        """The vision part of a packed micro-batch; None for a family that takes text only.

        Args:
            media: images and videos of all samples, in the order of their placeholders.
            placeholder_index: int64 [P], the packed position of each placeholder.
            model_config: of this family.

        Returns:
            A batch for a micro-batch without media too: each rank runs the vision tower in every micro-batch.
        """
        del media, placeholder_index, model_config
        return None

    @abc.abstractmethod
    def describe(self, model_config: Any) -> dict[str, str]:
        """Sizes of the model in words, by topic, for ``mm-convert inspect``."""

    @abc.abstractmethod
    def build_model(
        self,
        model_config: Any,
        options: ModelBuildOptions,
        *,
        device: str,
        dtype: torch.dtype,
        compute_dtype: torch.dtype,
        media: MediaSettings | None,
    ) -> Model:
        """The model with uninitialised parameters; under ``torch.device("meta")`` it allocates nothing.

        Args:
            model_config: of this family.
            options: the user's choices.
            device: kind of device (``Backend.name``) whose kernels are plugged in.
            dtype: of the parameters.
            compute_dtype: of forward and backward, by which kernels are chosen.
            media: from :meth:`read_media_settings`; None for a family that takes text only.

        Raises:
            UserError: if an implementation is not available on the device.
        """

    @abc.abstractmethod
    def weight_rules(self, model_config: Any, *, expert_layout: ExpertLayout) -> list[WeightRule]:
        """The map between Hugging Face tensors and the model's parameters, each of which occurs exactly once."""

    def layer_matrices(self, model_config: Any) -> Mapping[str, Matrices]:
        """Parameters that Muon trains, which are the weight matrices of the layers -> the matrices that each holds.

        AdamW trains all others, such as embeddings, the output layer, norms and biases. Without any the family cannot
        be trained with Muon.
        """
        del model_config
        return {}

    def adapters(
        self, model_config: Any, options: LoraOptions, rules: Sequence[ParameterRule] = ()
    ) -> tuple[Adapter, ...]:
        """The adapters of a LoRA run.

        Args:
            model_config: of the model.
            options: what is adapted.
            rules: of the user; what they freeze gets no adapters.

        Raises:
            UserError: see :func:`~mindspeed_mm.models.lora.plan_adapters`.
        """
        if unknown := set(options.parts or ()) - self.parts.keys():
            raise UserError(f"--lora-apply-modules {min(unknown)} is unknown; choose of {', '.join(self.parts)}")
        weights = self.weight_rules(model_config, expert_layout="hub")
        freezing = [rule for rule in rules if rule.trainable is False]
        settings = resolve(freezing, _infos(weights), parts=self.parts)
        unadapted = {
            name for name, setting in settings.items()
            if not setting.trainable or (options.parts is not None and setting.part not in options.parts)
        }
        return plan_adapters(options, weights, self.adapter_groups, frozen=unadapted)

    def parameter_settings(
        self, model_config: Any, rules: Sequence[ParameterRule] = (), *, lora: LoraOptions | None = None,
        muon: bool = False,
    ) -> Settings:
        """How each parameter is trained, kept and saved.

        Args:
            model_config: of the model.
            rules: see :func:`~mindspeed_mm.models.parameter_rules.compile_rules`; without any, everything trains.
            lora: train adapters instead of the weights that they adapt.
            muon: train the weight matrices of the layers with Muon; not with ``lora``.

        Raises:
            UserError: if a rule does not fit the model.
        """
        parameters = _infos(self.weight_rules(model_config, expert_layout="hub"))
        if lora is None:
            settings = resolve(rules, parameters, parts=self.parts)
            return with_muon(settings, self.layer_matrices(model_config)) if muon else settings
        return lora_settings(
            lora, self.adapters(model_config, lora, rules), rules, parameters, parts=self.parts
        )

    def initial_distribution(self, model_config: Any, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
        """Mean and standard deviation of a parameter's random initial values; constant where the deviation is 0.

        By default biases are 0, other vectors (norm weights) 1, and matrices normal with ``initializer_range``.
        """
        if name.endswith(".bias"):
            return 0.0, 0.0
        return (1.0, 0.0) if len(shape) == 1 else (0.0, model_config.initializer_range)

    def repeated_tensors(self, model_config: Any) -> dict[str, str]:
        """Tensors that a Hugging Face directory may hold although they repeat another -> the one that they repeat."""
        return {}

    @abc.abstractmethod
    def flop_counter(
        self, model_config: Any, *, frozen: Collection[str], adapters: Sequence[Adapter] = ()
    ) -> Callable[[Batch], float]:
        """Counts floating-point operations of a micro-batch's forward and backward pass, in 10^12.

        Args:
            model_config: of this family.
            frozen: names of the parts of which no weight trains, whether or not they have adapters.
            adapters: of a LoRA run.
        """

    @abc.abstractmethod
    def memory_units(self, plan: Plan) -> list[Unit]:
        """Parameters and activations of the model, by wrap unit in the order of forward, the root first."""

    @abc.abstractmethod
    def memory_exchanges(self, plan: Plan) -> dict[str, float]:
        """Bytes that a rank receives in a micro-batch by collectives of the model itself.

        Returns:
            ``expert_all_to_all``, ``context_all_to_all``, ``vision_all_gather`` -> bytes, those that there are.
        """

    def image_patches(self, pixels: int, model_config: Any) -> int:
        """Vision patches of ``pixels`` pixels; 0 for a family that takes text only."""
        del pixels, model_config
        return 0

    def merge_unit(self, model_config: Any) -> int:
        """Vision patches that become one token; 1 for a family that takes text only."""
        return 1


def _infos(rules: Sequence[WeightRule]) -> list[ParameterInfo]:
    """Parameters of the model, without adapters."""
    return [ParameterInfo(rule.target, rule.target_shape, tuple(name for name, _ in rule.sources)) for rule in rules]


def register(spec: ModelSpec) -> ModelSpec:
    """Make a family known under its ``model_types``; returns it.

    Raises:
        ValueError: if another family has one of them.
    """
    for model_type in spec.model_types:
        known = _REGISTERED.get(model_type)
        if known is not None and type(known) is not type(spec):
            names = f"{type(known).__name__}, not of {type(spec).__name__} too"
            raise ValueError(f"{model_type} is a model type of {names}")
    _REGISTERED.update(dict.fromkeys(spec.model_types, spec))
    return spec


def known_model_types() -> list[str]:
    """All ``model_type`` values that can be trained."""
    return sorted({*_BUILT_IN, *_REGISTERED})


def get_spec(model_type: str, *, source: str = "model_type") -> ModelSpec:
    """The family of a ``model_type``.

    Args:
        model_type: as in ``config.json``.
        source: what names it, for the message.

    Raises:
        UserError: naming the known ones.
    """
    if model_type not in _REGISTERED and model_type in _BUILT_IN:
        importlib.import_module(_BUILT_IN[model_type])
    if model_type not in _REGISTERED:
        raise UserError(
            f"{source} {shorten(model_type, 60)!r} is unknown; this project trains {' and '.join(known_model_types())}"
        )
    return _REGISTERED[model_type]


def spec_of(directory: str | Path) -> ModelSpec:
    """The family of a Hugging Face directory, by the ``model_type`` in its ``config.json``.

    Raises:
        UserError: if the file is missing, is not JSON, or is of another kind of model.
    """
    path, content = read_config_json(directory)
    return get_spec(str(content["model_type"]), source=f"{path}: model_type")
