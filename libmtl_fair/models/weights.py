"""Pretrained weights of an encoder, from a file: a state dict of torch, or safetensors."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from libmtl_fair._imports import optional
from libmtl_fair.errors import CheckpointError

HEAD = ("fc.", "classifier.", "head.", "heads.", "decoders.")
"""Beginnings of the names of weights that are of no encoder; files may hold them."""

_WRAPPED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.", "encoder.", "backbone.")


def load_weights(encoder: nn.Module, path: str | Path) -> None:
    """Put the weights of a file into an encoder.

    Parameters
    ----------
    encoder : nn.Module
        Whose names of weights the file has, perhaps after ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.``,
        ``encoder.`` or ``backbone.``, or several of them.
    path : str or Path
        A state dict as ``torch.save`` writes it (weights only; or a dict that holds one), or ``.safetensors``.

    Raises
    ------
    CheckpointError
        No such file, one that is no state dict, one of another network, or one with values that are not finite.
    """
    found = _read(Path(path))
    own = encoder.state_dict()
    while not set(found) & set(own):
        prefix = next((each for each in _PREFIXES if any(name.startswith(each) for name in found)), None)
        if prefix is None:
            break
        found = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
    name = type(encoder).__name__
    missing = [key for key in own if key not in found and not key.endswith("num_batches_tracked")]
    if missing:
        raise CheckpointError(
            f"{path}: {len(missing)} of {len(own)} weights of {name} are not in this file, the first {missing[0]!r}; it has "
            f"{', '.join(list(found)[:3]) or 'none'}, ...: is it of another network?"
        )
    other = [key for key in found if key not in own and not key.startswith(HEAD)]
    if other:
        raise CheckpointError(
            f"{path}: {len(other)} weights are none of {name}, the first {other[0]!r}: is it of another network?"
        )
    for key, value in found.items():
        if key in own and own[key].shape != value.shape:
            raise CheckpointError(
                f"{path}: {key!r} has shape {list(value.shape)}, and that of {name} has {list(own[key].shape)}; give the encoder_args "
                "that the file was made with, and images of as many channels"
            )
        if key in own and not bool(value.isfinite().all()):
            raise CheckpointError(
                f"{path}: {key!r} has values that are not finite: its training had failed; take another file"
            )
    encoder.load_state_dict({key: found.get(key, value) for key, value in own.items()})


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            loaded: object = optional("safetensors.torch", "export").load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file; weights must be a file with a state dict") from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, pickle.UnpicklingError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        if isinstance(error, pickle.UnpicklingError):  # torch's own advice is to trust the file
            first = "it holds more than tensors, or torch did not write it"
        raise CheckpointError(
            f"{path} cannot be read as a state dict ({first}); write it with torch.save(model.state_dict())"
        ) from error
    except Exception as error:  # safetensors' own
        raise CheckpointError(f"{path} cannot be read as safetensors ({error})") from error
    for key in _WRAPPED:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise CheckpointError(f"{path} holds no state dict (name -> tensor), but a {type(loaded).__name__}")
    return {str(name): value for name, value in loaded.items()}
