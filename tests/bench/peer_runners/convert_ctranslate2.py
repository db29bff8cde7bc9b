"""Converts a checkpoint to CTranslate2. Run by the interpreter that has ctranslate2, transformers and torch:

python convert_ctranslate2.py CHECKPOINT DIRECTORY int8|float32
"""

from __future__ import annotations

import sys

from ctranslate2.converters import TransformersConverter


def main() -> None:
    checkpoint, directory, weights = sys.argv[1:]
    TransformersConverter(checkpoint).convert(directory, quantization=weights, force=True)


if __name__ == "__main__":
    main()
