"""Any decoder that transformers knows, run by transformers' own modelling code with our paged attention inside.

The slower path: nothing is fused, and weights are loaded whole. transformers lets an attention function be registered
by name; ours finds the step's block tables through an object that is attached to the model's modules, stores keys and
values in the paged cache and attends over it. No code of the checkpoint is ever executed.

A forward pass over two tokens at load shows which attention layers there are and what they ask for. An architecture
that asks for what paged attention does not do is refused then, by name and reason, instead of answering wrongly.

Shapes: T tokens of the step, S sampled rows, V vocabulary, H query heads, G key-value heads, D hidden or head size.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cluster import kernels
from cluster.distributed.layout import Layout
from cluster.errors import CheckpointError, Unsupported
from cluster.layers.attention import AttentionMetadata
from cluster.models.config import ConfigFile, read_architecture

_SINGLE = Layout()
_ATTENTION = "cluster_paged"
_HOLDER = "cluster_paged_attention"
_LAYER_TYPES = {"full_attention", "sliding_attention"}
# These rescale the whole batch's rotary embedding by its longest sequence, cached keys excepted.
_LENGTH_DEPENDENT_ROPE = {"dynamic", "longrope"}
# Arguments that modelling code hands to every attention function and that change nothing for ours.
_NEUTRAL_ARGUMENTS = {"dropout", "position_ids", "use_cache", "output_attentions", "output_hidden_states"}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _LayerShape:
    num_kv_heads: int
    head_dim: int


class _PagedAttention:
    """What the registered attention function needs beyond its arguments: the step under way, or none while probing."""

    def __init__(self, architecture: str) -> None:
        self._architecture = architecture
        self._attn: AttentionMetadata | None = None
        self._kv_caches: Sequence[Tensor] = ()
        self.shapes: dict[int, _LayerShape] = {}

    @contextlib.contextmanager
    def step(self, attn: AttentionMetadata, kv_caches: Sequence[Tensor]) -> Iterator[None]:
        self._attn, self._kv_caches = attn, kv_caches
        try:
            yield
        finally:
            self._attn, self._kv_caches = None, ()

    def attend(
        self,
        module: nn.Module,
        q_1HTD: Tensor,
        k_1GTD: Tensor,
        v_1GTD: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **others: Any,
    ) -> Tensor:
        """Gives (1, T, H, D), as transformers expects it of an attention function."""
        if self._attn is None:
            self._probe(module, q_1HTD, k_1GTD, v_1GTD, others)
            return torch.zeros_like(q_1HTD).transpose(1, 2)
        q_THD, k_TGD, v_TGD = (x[0].transpose(0, 1) for x in (q_1HTD, k_1GTD, v_1GTD))
        kv_cache = self._kv_caches[module.layer_idx]
        kernels.reshape_and_cache(k_TGD, v_TGD, kv_cache, self._attn.slot_mapping_T)
        scale = q_THD.shape[-1] ** -0.5 if scaling is None else scaling
        plan = self._attn.plan(sliding_window)
        return kernels.paged_attention(q_THD, kv_cache, plan, scale=scale, softcap=softcap or 0.0).unsqueeze(0)

    def _probe(self, module: nn.Module, q_1HTD: Tensor, k_1GTD: Tensor, v_1GTD: Tensor, others: dict[str, Any]) -> None:
        causal = others.pop("is_causal", None)
        unknown = sorted(name for name, x in others.items() if x is not None and name not in _NEUTRAL_ARGUMENTS)
        if unknown:
            raise _refusal(self._architecture, f"its attention takes {', '.join(unknown)}, which ours does not know")
        if causal is False or (causal is None and not getattr(module, "is_causal", True)):
            raise _refusal(self._architecture, "its attention is not causal")
        layer = getattr(module, "layer_idx", None)
        if layer is None or layer in self.shapes:
            raise _refusal(self._architecture, "its attention layers are not numbered one by one")
        if k_1GTD.shape != v_1GTD.shape or k_1GTD.shape[2] != q_1HTD.shape[2]:
            raise _refusal(self._architecture, "its keys and values differ in shape, and one paged cache holds both")
        self.shapes[layer] = _LayerShape(num_kv_heads=k_1GTD.shape[1], head_dim=k_1GTD.shape[3])


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **arguments: Any
) -> tuple[Tensor, None]:
    holder: _PagedAttention = getattr(module, _HOLDER)
    return holder.attend(module, query, key, value, attention_mask=attention_mask, **arguments), None


# No mask function is registered under this name, so transformers makes no masks; a model that makes its own is refused.
AttentionInterface.register(_ATTENTION, _attention)


class _DecoderOutput:
    """Hidden states (1, S, D) and None for whatever else a head passes on: caches, attentions, router logits."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]


class _GivenHiddenStates(nn.Module):
    """Stands where a language model has its decoder, so that its head runs alone, with its own scales and caps."""

    hidden_SD: Tensor

    @property
    def decoder(self) -> _GivenHiddenStates:
        """OPT's head reaches past its model for the decoder in it."""
        return self

    def forward(self, *_args: Any, **_kwargs: Any) -> _DecoderOutput:
        return _DecoderOutput(self.hidden_SD.unsqueeze(0))


class TransformersModel(nn.Module):
    """A causal language model of transformers behind the interface of our own models.

    Attributes: as in ``registry.Model``.
    """

    backend = "transformers (slower path)"
    is_first_stage = is_last_stage = True

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Args:
            model: loaded with ``attn_implementation="cluster_paged"``, on its device, in evaluation mode.

        Raises:
            Unsupported: the architecture asks for what paged attention does not do.
        """
        super().__init__()
        self._architecture = type(model).__name__
        if "position_ids" not in inspect.signature(model.base_model.forward).parameters:
            raise _refusal(self._architecture, "its modelling code counts positions itself, one sequence at a time")
        self._paged = _PagedAttention(self._architecture)
        for module in model.modules():
            setattr(module, _HOLDER, self._paged)
        self.body = model.base_model
        self._hidden_states = _GivenHiddenStates()
        setattr(model, model.base_model_prefix, self._hidden_states)
        self.head = model
        config = model.config.get_text_config()
        self.vocab_size: int = config.vocab_size
        self.vocab_range = (0, self.vocab_size)
        self.hidden_size: int = config.hidden_size
        self.max_position_embeddings = _max_position_embeddings(self._architecture, config)
        # Nothing is said of what lies between: this is room for an MLP of eight times the hidden size, unfused.
        self.activation_width = 32 * config.hidden_size
        self.num_layers, self.num_kv_heads, self.head_dim = self._probe(config.num_hidden_layers)

    @classmethod
    def from_checkpoint(
        cls, checkpoint: Path, dtype: torch.dtype, device: torch.device, layout: Layout = _SINGLE
    ) -> TransformersModel:
        """Loads a Hugging Face directory's safetensors.

        Raises:
            Unsupported: transformers does not know the architecture, it cannot run on paged attention, or the layout
                has several ranks.
            CheckpointError: files or tensors are missing or do not fit the configuration.
        """
        config, model_class = _causal_lm(checkpoint)
        if layout.world_size > 1:
            raise Unsupported(
                f"{model_class.__name__} runs on transformers' own modelling code, which is not cut into shards: set "
                f"parallel.tp and parallel.pp to 1 (they are {layout.tp_size} and {layout.pp_size}), or serve an "
                f"architecture with model code of ours"
            )
        _log.warning(
            "%s runs on transformers' own modelling code, the slower path: nothing is fused", model_class.__name__
        )
        return cls(_load(model_class, config, checkpoint, dtype).to(device).eval())

    def forward(
        self, input_ids_T: Tensor, positions_T: Tensor, attn: AttentionMetadata, kv_caches: Sequence[Tensor]
    ) -> Tensor:
        """hidden_TD of the step's tokens; their keys and values go to ``kv_caches``, one (2, blocks, size, G, D) each
        layer."""
        with self._paged.step(attn, kv_caches):
            return self._hidden(input_ids_T, positions_T)

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        """logits_SV, float32."""
        self._hidden_states.hidden_SD = hidden_SD
        try:
            # The ids are never looked at: they only satisfy models that ask for some.
            ids_1S = torch.zeros(1, hidden_SD.shape[0], dtype=torch.int64, device=hidden_SD.device)
            return self.head(input_ids=ids_1S, use_cache=False).logits[0].float()
        finally:
            del self._hidden_states.hidden_SD

    def _hidden(self, input_ids_T: Tensor, positions_T: Tensor) -> Tensor:
        output = self.body(input_ids=input_ids_T.unsqueeze(0), position_ids=positions_T.unsqueeze(0), use_cache=False)
        return output.last_hidden_state[0]

    @torch.inference_mode()
    def _probe(self, num_layers: int) -> tuple[int, int, int]:
        """Layers, key-value heads and head size, as one pass without a cache shows them."""
        ids_T = torch.zeros(2, dtype=torch.int64, device=self.body.device)
        try:
            self.compute_logits(self._hidden(ids_T, torch.arange(2, device=ids_T.device)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _refusal(
                self._architecture, f"its modelling code failed on two tokens ({type(error).__name__}: {error})"
            ) from error
        shapes = self._paged.shapes
        if sorted(shapes) != list(range(num_layers)):
            raise _refusal(
                self._architecture, f"{len(shapes)} of its {num_layers} layers use transformers' attention interface"
            )
        if len(set(shapes.values())) > 1:
            raise _refusal(self._architecture, "its layers differ in key-value heads or head size")
        return num_layers, shapes[0].num_kv_heads, shapes[0].head_dim


def _refusal(architecture: str, reason: str) -> Unsupported:
    return Unsupported(f"{architecture} cannot run on the transformers back end: {reason}")


def _max_position_embeddings(architecture: str, config: PretrainedConfig) -> int:
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context < 1:
        raise _refusal(architecture, "its config.json does not say how long a context it holds")
    return context


def _causal_lm(checkpoint: Path) -> tuple[PretrainedConfig, type[PreTrainedModel]]:
    """The checkpoint's configuration and its class in transformers, both known to fit paged attention on paper."""
    file = ConfigFile.read(checkpoint / "config.json")
    architecture = read_architecture(file)
    if file.boolean("is_encoder_decoder", False):
        raise _refusal(architecture, "it is an encoder-decoder; only decoders are served")
    try:
        config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError) as error:
        reason = f"transformers has no model_type {file.values.get('model_type')!r}"
        if file.has("auto_map"):
            reason += ", and code that a checkpoint brings along (auto_map) is never executed"
        raise _refusal(architecture, reason) from error
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # For a few configurations transformers lists several classes.
    if not isinstance(model_class, type) or model_class.__name__ != architecture:
        raise _refusal(architecture, "it is no causal language model of transformers (text in, text out)")
    _check_paper(architecture, model_class, config.get_text_config())
    return config, model_class


def _check_paper(architecture: str, model_class: type[PreTrainedModel], config: PretrainedConfig) -> None:
    if model_class._is_stateful:
        raise _refusal(architecture, "it keeps a recurrent state (Mamba, linear attention or convolution layers)")
    # A model fit for flash attention passes windows and caps as arguments. Others may hide them in a dense mask.
    if not (model_class._can_set_attn_implementation() and model_class._supports_flash_attn):
        raise _refusal(architecture, "its modelling code does not use transformers' attention interface in full")
    others = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    if others:
        raise _refusal(architecture, f"it has layers of type {', '.join(others)}")
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):
        if isinstance(rope, dict) and rope.get("rope_type") in _LENGTH_DEPENDENT_ROPE:
            raise _refusal(
                architecture, f"its rotary embedding ({rope['rope_type']}) depends on the batch's longest sequence"
            )


def _load(
    model_class: type[PreTrainedModel], config: PretrainedConfig, checkpoint: Path, dtype: torch.dtype
) -> PreTrainedModel:
    try:
        with _without_progress_bars():
            model, report = model_class.from_pretrained(
                checkpoint,
                config=config,
                dtype=dtype,
                attn_implementation=_ATTENTION,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: transformers cannot load {model_class.__name__}: {error}") from error
    # transformers would go on with random values for these.
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise CheckpointError(f"{checkpoint}: {len(missing)} tensors are missing from the safetensors files: {shown}")
    return model


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
