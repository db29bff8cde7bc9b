"""Where the Triton kernels are tested: on the CUDA device where there is one, else on the CPU in Triton's interpreter.

Import it before anything that imports triton, which reads its mode once.
"""

from __future__ import annotations

import importlib.util
import os
import sys

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)
if torch.cuda.is_available():
    DEVICE = torch.device("cuda")
else:
    DEVICE = torch.device("cpu")
    if "triton" in sys.modules and not sys.modules["triton"].knobs.runtime.interpret:
        raise RuntimeError("triton was imported before its interpreter was asked for")
    os.environ["TRITON_INTERPRET"] = "1"

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def assert_near(output: torch.Tensor, expected: torch.Tensor) -> None:
    assert output.dtype == expected.dtype
    assert output.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype] * max(1.0, expected.abs().max().item())
    assert (output.float() - expected.float()).abs().max().item() <= tolerance


def _dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """The interpreter's product of two tiles, but with rows that do not depend on their place in the tile, as on a
    device (numpy's come from a BLAS), and with bfloat16 taken for what it is rather than for the integers that hold
    it."""
    from triton.runtime import interpreter

    def wide(operand):
        if operand.dtype == interpreter.tl.bfloat16:
            return interpreter._convert_float(operand.data, operand.dtype, interpreter.tl.float32, None).view(
                np.float32
            )
        return operand.data.astype(np.float32)

    product = np.einsum("mk,kn->mn", wide(a), wide(b), optimize=False)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


if DEVICE.type == "cpu":
    import quick_interpreter
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_dot = _dot
    quick_interpreter.install()
