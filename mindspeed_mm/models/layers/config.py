"""Reading ``config.json``, and the configuration of a decoder that families share. Imports no torch."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mindspeed_mm.errors import UserError
from mindspeed_mm.inputs import is_present, read_json, shorten, shown


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """A decoder-only transformer with RMSNorm, rotary positions and gated MLPs or experts. Widths are in channels.

    Attributes:
        qk_layernorm: whether queries and keys are normalised per head.
        num_experts: 0 in a dense model.
        decoder_sparse_step: every how many layers one has experts.
        mlp_only_layers: layers (from 0) that are dense all the same.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    intermediate_size: int
    hidden_act: str
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    initializer_range: float
    qk_layernorm: bool = True
    num_experts: int = 0
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    decoder_sparse_step: int = 1
    mlp_only_layers: tuple[int, ...] = ()
    router_aux_loss_coef: float = 0.0

    @functools.cached_property
    def _dense_layers(self) -> frozenset[int]:
        # a set, since a file may list thousands and every layer asks several times
        return frozenset(self.mlp_only_layers)

    def is_moe_layer(self, layer: int) -> bool:
        """Whether ``layer`` (from 0) has experts instead of a dense MLP."""
        return (
            self.num_experts > 0
            and layer not in self._dense_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )


@dataclasses.dataclass(frozen=True)
class Field:
    """What a field of a model directory's JSON file may hold. A boolean is no number; a whole number is one, too.

    Attributes:
        kind: int, float, bool, str, or list.
        low: least number, or least entry of a list.
        high: largest one.
        nullable: whether null stands for a missing field.
        of: int or float, the entries of a list.
        most: entries of a list at most.
    """

    kind: type
    low: float = 1
    high: float = 1 << 31
    nullable: bool = False
    of: type = int
    most: int = 10_000

    def accepts(self, value: Any) -> bool:
        """Whether ``value`` is of the kind and within the limits."""
        if self.kind is list:
            entry = Field(self.of, self.low, self.high)
            return isinstance(value, (list, tuple)) and len(value) <= self.most and all(map(entry.accepts, value))
        if self.kind in (bool, str):
            return isinstance(value, self.kind)
        # NaN lies between no limits
        return (type(value) is int or type(value) is self.kind) and self.low <= value <= self.high

    def __str__(self) -> str:
        if self.kind in (bool, str):
            return "true or false" if self.kind is bool else "a string"
        kind = self.of if self.kind is list else self.kind
        limits = " to ".join(str(limit) if isinstance(limit, int) else f"{limit:g}" for limit in (self.low, self.high))
        noun = "whole number" if kind is int else "number"
        if self.kind is list:
            return f"a list of at most {self.most} {noun}s from {limits}"
        return f"a {noun} from {limits}"


def check_fields(section: Mapping[str, Any], fields: Mapping[str, Field], *, source: str, name: str = "") -> None:
    """Check those of ``fields`` that a section has, before anything is computed with them.

    Args:
        section: an object of the file.
        fields: what each field may hold; others are not read, and may hold anything.
        source: the file, for messages.
        name: of the section, for messages; empty for the whole file.

    Raises:
        UserError: naming ``source``, the field, its value and what it must be.
    """
    for key, field in fields.items():
        if key not in section or (section[key] is None and field.nullable) or field.accepts(section[key]):
            continue
        where = f"{name}.{key}" if name else key
        raise UserError(f"{source}: {where} is {shown(section[key])}; it must be {field}")


# Written by versions of transformers into the config of any model, and without an effect on training.
_GENERAL_FIELDS = frozenset("""
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _name_or_path
    add_cross_attention architectures attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id id2label is_decoder is_encoder_decoder label2id length_penalty max_length
    min_length model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16 use_cache
""".split())


def unknown_fields(section: Mapping[str, Any], known: Collection[str], *, name: str = "") -> list[str]:
    """Fields of a section that mean nothing and are not null, such as a name with a typo.

    Args:
        section: an object of ``config.json``.
        known: fields that are read, or known to be without an effect.
        name: of the section; empty for the whole file.

    Returns:
        The dotted name of each, with the known field that it resembles.
    """
    found = []
    for key, value in section.items():
        if value is not None and key not in known and key not in _GENERAL_FIELDS:
            near = difflib.get_close_matches(key[:100], known, n=1, cutoff=0.7)
            found.append(f"{name}.{key}".lstrip(".") + (f" ({near[0]}?)" if near else ""))
    return found


def check_section(value: Any, *, source: str, name: str) -> None:
    """Check that a part of a file is an object.

    Raises:
        UserError: naming ``source``, the part and what it is.
    """
    if not isinstance(value, Mapping):
        raise UserError(f"{source}: {name} is {shown(value)}; it must be an object with named fields")


def read_config_json(directory: str | Path) -> tuple[Path, dict[str, Any]]:
    """The path and the content of ``directory/config.json``, which has a ``model_type``.

    Raises:
        UserError: if the file is missing, is not JSON, or has no ``model_type``.
    """
    path = Path(directory) / "config.json"
    if not is_present(path):
        raise UserError(
            f"{path} does not exist: {shorten(str(directory)) or 'the empty path'} is not a Hugging Face model "
            "directory; download the weights first (step 2 of the guide) or correct the path"
        )
    content = read_json(path, remedy="download it again")
    model_type = content.get("model_type")
    if not isinstance(model_type, str):
        found = "" if model_type is None else f" that is a string, but {shown(model_type)}"
        raise UserError(f"{path} has no model_type{found}; download it again, or correct the path")
    return path, content
