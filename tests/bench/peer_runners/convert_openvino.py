"""Exports a checkpoint to OpenVINO with NNCF's weight compression. Run by the interpreter that has optimum-intel:

python convert_openvino.py CHECKPOINT DIRECTORY float32|int8|int4
"""

from __future__ import annotations

import sys

from optimum.intel import OVModelForCausalLM, OVWeightQuantizationConfig

# What `optimum-cli export openvino --weight-format` takes by default, and --group-size 128.
COMPRESSION = {
    "float32": None,
    "int8": {"bits": 8, "sym": False},
    "int4": {"bits": 4, "sym": False, "group_size": 128, "ratio": 1.0},
}


def main() -> None:
    checkpoint, directory, weights = sys.argv[1:]
    compression = COMPRESSION[weights]
    model = OVModelForCausalLM.from_pretrained(
        checkpoint,
        export=True,
        compile=False,
        load_in_8bit=False,
        quantization_config=None if compression is None else OVWeightQuantizationConfig(**compression),
    )
    model.save_pretrained(directory)


if __name__ == "__main__":
    main()
