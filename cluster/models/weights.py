"""Weights from safetensors files straight into a model's parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from cluster.errors import CheckpointError
from cluster.layers.linear import MergedLinear
from cluster.models.config import ConfigFile

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_DTYPES = ("F64", "F32", "F16", "BF16")


def load_weights(model: nn.Module, checkpoint: Path) -> None:
    """Fills every parameter of ``model``, converting to its dtype and device.

    Raises:
        CheckpointError: naming the file and tensor that is missing, left over, of another shape, or broken.
    """
    targets, tied = checkpoint_tensors(model)
    missing, unexpected = set(targets), []
    for file, name, tensor in _stored_tensors(checkpoint):
        if name in tied or name.endswith(".rotary_emb.inv_freq"):  # older checkpoints store what can be derived
            continue
        if name not in targets:
            unexpected.append(f"{name} ({file.name})")
            continue
        if name not in missing:
            raise CheckpointError(f"{file}: tensor {name} is stored twice, here and in another file")
        if tensor.shape != targets[name].shape:
            raise CheckpointError(
                f"{file}: tensor {name} has shape {list(tensor.shape)}; config.json asks for "
                f"{list(targets[name].shape)}"
            )
        targets[name].copy_(tensor)
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{checkpoint}: {_listing(missing)} missing from the safetensors files")
    if unexpected:
        raise CheckpointError(
            f"{checkpoint}: {_listing(unexpected)} in the safetensors files but not in the model that config.json "
            f"describes"
        )


def checkpoint_tensors(model: nn.Module) -> tuple[dict[str, Tensor], set[str]]:
    """(tensor name in a checkpoint to the parameter, or view of one, that takes it; names tied to another's)."""
    targets: dict[str, Tensor] = {}
    tied: set[str] = set()
    owned: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, MergedLinear):
            parent = prefix.rpartition(".")[0]
            targets |= {f"{parent}.{name}": rows for name, rows in module.part_tensors()}
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in owned:
                tied.add(f"{prefix}.{name}")
            else:
                owned.add(parameter)
                targets[f"{prefix}.{name}"] = parameter
    return targets, tied


def num_weights(checkpoint: Path) -> int:
    """Numbers stored in the checkpoint, from its files' headers."""
    total = 0
    for file in weight_files(checkpoint):
        with _opened(file) as tensors:
            total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return total


def weight_files(checkpoint: Path) -> list[Path]:
    """The safetensors files, single or sharded.

    Raises:
        CheckpointError: there are none, or the index names one that is not there.
    """
    if (checkpoint / _SINGLE).is_file():
        return [checkpoint / _SINGLE]
    if (checkpoint / _INDEX).is_file():
        return [checkpoint / name for name in sorted(set(_weight_map(checkpoint).values()))]
    if pickles := sorted(path.name for path in checkpoint.glob("*.bin")):
        raise CheckpointError(
            f"{checkpoint} holds pickled weights only ({', '.join(pickles[:3])}), which can run code when loaded: "
            f"convert them to safetensors (save_pretrained of transformers does)"
        )
    raise CheckpointError(f"{checkpoint} has no weights: neither {_SINGLE} nor {_INDEX} is there")


def _weight_map(checkpoint: Path) -> dict[str, str]:
    index = ConfigFile.read(checkpoint / _INDEX)
    if not index.has("weight_map"):
        raise index.error("weight_map", "is missing")
    weight_map = index.sub("weight_map").values
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise index.error(f"weight_map.{name}", f"is {file!r}; it must be the name of a file beside the index")
        if not (checkpoint / file).is_file():
            raise index.error(f"weight_map.{name}", f"names {file}, which is not there: the download is incomplete")
    return dict(weight_map)


def _stored_tensors(checkpoint: Path) -> Iterator[tuple[Path, str, Tensor]]:
    for file in weight_files(checkpoint):
        with _opened(file) as tensors:
            for name in tensors.keys():  # noqa: SIM118 (an open file, not a dict)
                stored = tensors.get_slice(name).get_dtype()
                if stored not in _DTYPES:
                    raise CheckpointError(
                        f"{file}: tensor {name} is stored as {stored}; it must be one of {', '.join(_DTYPES)}"
                    )
                yield file, name, tensors.get_tensor(name)


def _opened(file: Path) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is no complete safetensors file: {error}") from error


def _listing(names: set[str] | list[str], limit: int = 5) -> str:
    shown = ", ".join(sorted(names)[:limit])
    rest = len(names) - limit
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{f' and {rest} more' if rest > 0 else ''}"
