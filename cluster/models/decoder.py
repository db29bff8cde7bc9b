"""The decoder that the Llama family shares: pre-norm blocks of paged attention and a gated MLP.

Attribute names are Hugging Face's, so that loading is a loop; only the projections of one input are merged
(``qkv_proj``, ``gate_up_proj``).

Shapes: T tokens of a step, S rows that sample, D hidden or head size, R half a head, N all heads of queries, keys and
values, G key-value heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from cluster import kernels
from cluster.layers.attention import Attention, AttentionMetadata
from cluster.layers.embedding import Embedding, OutputHead
from cluster.layers.linear import Linear, MergedLinear
from cluster.layers.norm import RMSNorm
from cluster.layers.rotary import RotaryEmbedding
from cluster.models.config import ModelConfig

Streams = tuple[Tensor, Tensor]
"""What a layer, and a pipeline's stage, hands on: (output of its MLP, residual stream without it), each (T, D)."""


@dataclass(frozen=True, kw_only=True)
class DecoderOptions:
    """What tells one family from another.

    Attributes:
        qkv_bias, output_bias: of the attention's projections.
        mlp_bias: of the MLP's projections.
        qk_norm: queries and keys are normalised per head before the rotation.
        sliding_windows: one per layer; None: the layer sees everything.
    """

    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_windows: tuple[int | None, ...]


class DecoderAttention(nn.Module):
    def __init__(self, config: ModelConfig, options: DecoderOptions, sliding_window: int | None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = {"q_proj": q_size, "k_proj": kv_size, "v_proj": kv_size}
        self.qkv_proj = MergedLinear(config.hidden_size, parts, bias=options.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, bias=options.output_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if options.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if options.qk_norm else None
        self.attention = Attention(
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            scale=self.head_dim**-0.5,
            sliding_window=sliding_window,
        )

    def forward(
        self, x_TD: Tensor, rope_TR: tuple[Tensor, Tensor], attn: AttentionMetadata, kv_cache: Tensor
    ) -> Tensor:
        heads, kv_heads = self.num_heads, self.num_kv_heads
        qkv_TND = self.qkv_proj(x_TD).view(x_TD.shape[0], heads + 2 * kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            self.q_norm.heads_(qkv_TND[:, :heads])
            self.k_norm.heads_(qkv_TND[:, heads : heads + kv_heads])
        out_THD = self.attention(qkv_TND, rope_TR, kv_cache, attn)
        return self.o_proj(out_THD.flatten(1))


class DecoderMLP(nn.Module):
    def __init__(self, config: ModelConfig, *, bias: bool) -> None:
        super().__init__()
        parts = {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        self.gate_up_proj = MergedLinear(config.hidden_size, parts, bias=bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(kernels.silu_mul(self.gate_up_proj(x_TD)))


class DecoderLayer(nn.Module):
    def __init__(self, config: ModelConfig, options: DecoderOptions, sliding_window: int | None) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = DecoderAttention(config, options, sliding_window)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = DecoderMLP(config, bias=options.mlp_bias)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        rope_TR: tuple[Tensor, Tensor],
        attn: AttentionMetadata,
        kv_cache: Tensor,
    ) -> Streams:
        """The next norm adds the two streams, in one call with its own work."""
        if residual_TD is None:
            x_TD, residual_TD = self.input_layernorm(x_TD), x_TD
        else:
            x_TD, residual_TD = self.input_layernorm.add(x_TD, residual_TD)
        x_TD = self.self_attn(x_TD, rope_TR, attn, kv_cache)
        x_TD, residual_TD = self.post_attention_layernorm.add(x_TD, residual_TD)
        return self.mlp(x_TD), residual_TD


class Decoder(nn.Module):
    """The layers, and what stands before and after them.

    A pipeline's stage has some of the layers, under their numbers in the whole model. Only the first stage embeds and
    only the last has ``norm``; a last stage whose output head is tied keeps ``embed_tokens`` for its weight.
    """

    embed_tokens: Embedding | None
    norm: RMSNorm | None

    def __init__(self, config: ModelConfig, options: DecoderOptions) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleDict(
            {str(i): DecoderLayer(config, options, window) for i, window in enumerate(options.sliding_windows)}
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config.rope, config.head_dim)

    def forward(
        self,
        x_TD: Tensor,
        residual_TD: Tensor | None,
        positions_T: Tensor,
        attn: AttentionMetadata,
        kv_caches: Sequence[Tensor],
    ) -> Streams:
        """The layers alone."""
        rope_TR = self.rotary_emb(positions_T, x_TD.dtype)
        for layer, kv_cache in zip(self.layers.values(), kv_caches, strict=True):
            x_TD, residual_TD = layer(x_TD, residual_TD, rope_TR, attn, kv_cache)
        return x_TD, residual_TD


class DecoderForCausalLM(nn.Module):
    """Base of the families; a family says what is its own in ``options``.

    Built whole; ``pipeline_parallel`` and ``tensor_parallel`` make a stage's and a rank's part of it.

    Attributes: as in ``registry.Model``.
    """

    backend = "cluster"

    def __init__(self, config: ModelConfig) -> None:
        """Leaves every weight empty: a loader fills them."""
        super().__init__()
        self.num_layers = config.num_hidden_layers
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.hidden_size = config.hidden_size
        self.vocab_size = config.vocab_size
        self.vocab_range = (0, config.vocab_size)
        self.max_position_embeddings = config.max_position_embeddings
        self.is_first_stage = self.is_last_stage = True
        # The residual stream and its norm, beside gates, ups and their product; attention holds fewer.
        self.activation_width = 3 * config.hidden_size + 3 * config.intermediate_size
        self.model = Decoder(config, self.options(config))
        tied_to = self.model.embed_tokens if config.tie_word_embeddings else None
        self.lm_head: OutputHead | None = OutputHead(config.vocab_size, config.hidden_size, tied_to=tied_to)

    @staticmethod
    def options(config: ModelConfig) -> DecoderOptions:
        """The family's own traits, from its own keys of ``config.file``."""
        raise NotImplementedError

    def forward(
        self, inputs: Tensor | Streams, positions_T: Tensor, attn: AttentionMetadata, kv_caches: Sequence[Tensor]
    ) -> Tensor | Streams:
        """Runs the stage; the step's keys and values go to ``kv_caches``.

        Args:
            inputs: the first stage: token ids (T,), int64; any other: what the stage before gave.
            positions_T: int64, on the model's device as all others.
            kv_caches: one (2, num_blocks, block_size, G, head_dim) for each of the stage's layers.

        Returns:
            The last stage: hidden states (T, D) after the last norm; any other: the streams for the next one.
        """
        x_TD, residual_TD = (self.embed(inputs), None) if self.is_first_stage else inputs
        streams = self.model(x_TD, residual_TD, positions_T, attn, kv_caches)
        return self.finish(streams) if self.is_last_stage else streams

    def embed(self, input_ids_T: Tensor) -> Tensor:
        """(T, D); on the first stage."""
        return self.model.embed_tokens(input_ids_T)

    def finish(self, streams: Streams) -> Tensor:
        """Hidden states (T, D) after the last norm; on the last stage."""
        return self.model.norm.add(*streams)[0]

    def compute_logits(self, hidden_SD: Tensor) -> Tensor:
        """float32 logits (S, V) of the ids in ``vocab_range``; on the last stage. As one of several tensor parallel
        ranks V is the same on all, ``ceil(vocab_size / tp_size)``: columns beyond the range are padding."""
        return self.lm_head(hidden_SD)
