"""Compiles every Triton kernel for Hopper, as its wrapper would launch it, on a machine without a GPU.

Run as a script, without Triton's interpreter. Launches are replaced by the compiler: types, constants and alignments
come from the arguments of real calls. Prints one JSON object per kernel compiled. float16, and float32 made batch
invariant, take the same ways as the others: they are left to CLUSTER_TEST_FULL=1.
"""

from __future__ import annotations

import json
import os
import re
from typing import Any

import numpy as np
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from cluster.kernels.triton.attention import paged_attention, plan_attention
from cluster.kernels.triton.linear import linear
from cluster.kernels.triton.packed_weight import pack
from cluster.kernels.triton.penalties import Penalties, apply_penalties
from cluster.kernels.triton.reshape_and_cache import reshape_and_cache
from cluster.kernels.triton.rms_norm import add_rms_norm, rms_norm
from cluster.kernels.triton.rotary_and_cache import rotary_and_cache
from cluster.kernels.triton.sample import SamplingBatch, sample
from cluster.kernels.triton.silu_mul import silu_mul

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# Llama 3.1 8B, but for the length of its tensors.
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, BLOCK_SIZE, VOCAB = 32, 8, 128, 4096, 16, 128256


def compile_launch(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    del grid, warmup
    values = dict(zip(kernel.arg_names, args, strict=False)) | {k: v for k, v in kwargs.items() if k not in OPTIONS}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + TYPES[value.dtype]
            attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {name: value for name, value in kwargs.items() if name in OPTIONS}
    compiled = triton.compile(source, target=HOPPER, options=options)
    ptx = compiled.asm["ptx"]
    print(
        json.dumps(
            {
                "kernel": kernel.__name__,
                "case": case,
                "shared_bytes": compiled.metadata.shared,
                "wgmma": sorted(set(re.findall(r"wgmma\.mma_async\.sync\.aligned\.(m64n\d+k\d+)", ptx))),
                "mma": sorted(set(re.findall(r"mma\.sync\.aligned\.(m\d+n\d+k\d+)", ptx))),
                "async_copies": ptx.count("cp.async.c"),
                "cubin_bytes": len(compiled.asm["cubin"]),
            }
        ),
        flush=True,
    )


def attend(dtype: torch.dtype, *, batch_invariant: bool, sliding_window: int | None, softcap: float) -> None:
    query_lens, context_lens = [1, 1, 40], [300, 7, 90]
    tables = np.zeros((3, 19), dtype=np.int64)
    plan = plan_attention(
        query_lens,
        context_lens,
        tables,
        block_size=BLOCK_SIZE,
        sliding_window=sliding_window,
        dtype=dtype,
        device=torch.device("cpu"),
        batch_invariant=batch_invariant,
    )
    kv_cache = torch.zeros(2, 32, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype)
    paged_attention(torch.zeros(42, HEADS, HEAD_DIM, dtype=dtype), kv_cache, plan, scale=0.1, softcap=softcap)


def rows(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(count, dtype=dtype)


JITFunction.run = compile_launch
INVARIANCE = {torch.bfloat16: (False, True), torch.float32: (False,)}
if os.environ.get("CLUSTER_TEST_FULL") == "1":
    INVARIANCE = dict.fromkeys((torch.bfloat16, torch.float16, torch.float32), (False, True))
for dtype, switch in INVARIANCE.items():
    for batch_invariant in switch:
        case = f"{dtype}, invariant={batch_invariant}"
        attend(dtype, batch_invariant=batch_invariant, sliding_window=None, softcap=0.0)
        weight = torch.zeros(HIDDEN, HIDDEN, dtype=dtype)
        for num_rows in (1, 300):
            case = f"{dtype}, invariant={batch_invariant}, rows={num_rows}"
            x = torch.zeros(num_rows, HIDDEN, dtype=dtype)
            linear(x, weight, weight[0], batch_invariant=batch_invariant)
            for format in ("int8", "int4"):
                linear(x, pack(weight[:128], format), batch_invariant=batch_invariant)
    case = f"{dtype}"
    x = torch.zeros(5, HIDDEN, dtype=dtype)
    rms_norm(x, x[0], 1e-5)
    add_rms_norm(x, x, x[0], 1e-5)
    silu_mul(x)
    qkv, angles = torch.zeros(5, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=dtype), torch.zeros(5, HEAD_DIM // 2)
    kv_cache, slots = torch.zeros(2, 4, BLOCK_SIZE, KV_HEADS, HEAD_DIM, dtype=dtype), torch.arange(5)
    rotary_and_cache(qkv, angles, angles, kv_cache, slots, HEADS, KV_HEADS)
    reshape_and_cache(qkv[:, :KV_HEADS], qkv[:, KV_HEADS : 2 * KV_HEADS], kv_cache, slots)
case = "window and softcap"
attend(torch.bfloat16, batch_invariant=False, sliding_window=100, softcap=30.0)
case = "sampling"
scores = torch.zeros(4, VOCAB)
for has_filters in (False, True):
    batch = SamplingBatch(
        keys_R=rows(4, torch.int64),
        temperatures_R=rows(4, torch.float32),
        top_ks_R=rows(4, torch.int32),
        top_ps_R=rows(4, torch.float64),
        log_min_ps_R=rows(4, torch.float32),
        has_filters=has_filters,
    )
    sample(scores, batch)
penalties = Penalties(
    rows_A=rows(2, torch.int64),
    table_rows_A=rows(2, torch.int64),
    prompt_lens_A=rows(2, torch.int32),
    num_tokens_A=rows(2, torch.int32),
    repetition_A=rows(2, torch.float32),
    presence_A=rows(2, torch.float32),
    frequency_A=rows(2, torch.float32),
    max_tokens=100,
    bias_rows_E=rows(3, torch.int64),
    bias_ids_E=rows(3, torch.int64),
    biases_E=rows(3, torch.float32),
    suppressed_rows_K=rows(3, torch.int64),
    suppressed_ids_K=rows(3, torch.int64),
)
apply_penalties(scores, torch.zeros(4, 128, dtype=torch.int32), penalties)
