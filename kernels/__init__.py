"""One public function per op. The backend is picked here, once, when the package is imported.

Formulas, shapes and dtypes are documented in ``reference.py``, which every backend is tested against. Linear layers
stay ``torch.nn.functional.linear``.
"""

from cluster.kernels.torch_attention import AttentionGroup, paged_attention, plan_attention
from cluster.kernels.torch_ops import add_rms_norm, reshape_and_cache, rms_norm, rotary, silu_mul

BACKEND = "torch"

__all__ = [
    "BACKEND",
    "AttentionGroup",
    "add_rms_norm",
    "paged_attention",
    "plan_attention",
    "reshape_and_cache",
    "rms_norm",
    "rotary",
    "silu_mul",
]
