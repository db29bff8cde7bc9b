"""One stage of a pipeline: some of a model's layers, with what stands before the first and after the last of them.

Built from the whole model on torch's "meta" device, before its weights load, so that what a stage lacks is never read.
"""

from __future__ import annotations

from cluster.distributed.layout import Layout
from cluster.errors import ConfigError
from cluster.models.decoder import DecoderForCausalLM


def take_stage(model: DecoderForCausalLM, layout: Layout) -> None:
    """Cuts ``model`` down to the layers of ``layout.layers``, which keep their numbers.

    The embedding stays on the first stage, the last norm and the output head on the last; tied weights on both.

    Raises:
        ConfigError: there are more stages than layers.
        ValueError: ``layout.layers`` is unset though there are several stages, or no range of the model's layers.
    """
    num_layers = model.num_layers
    if layout.pp_size > num_layers:
        raise ConfigError(
            f"parallel.pp is {layout.pp_size}, but the model has {num_layers} layers, and every stage needs one: lower "
            f"it to {num_layers} or less",
            field="parallel.pp",
        )
    if layout.layers is None:
        if layout.pp_size > 1:
            raise ValueError(f"stage {layout.pp_rank} of {layout.pp_size} must be told its layers")
        return
    first, last = layout.layers
    if not 0 <= first < last <= num_layers:
        raise ValueError(f"layers {first} to {last} are no range of the model's {num_layers}")
    decoder = model.model
    for layer in (*range(first), *range(last, num_layers)):
        del decoder.layers[str(layer)]
    model.num_layers = last - first
    model.is_first_stage, model.is_last_stage = layout.is_first_stage, layout.is_last_stage
    is_tied = model.lm_head.weight is decoder.embed_tokens.weight
    if not layout.is_last_stage:
        decoder.norm = model.lm_head = None
    if not layout.is_first_stage and not (layout.is_last_stage and is_tied):
        decoder.embed_tokens = None
