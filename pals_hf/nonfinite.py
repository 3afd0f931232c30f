"""Saves a training step whose loss or gradient is not finite, so that its cause can be found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .data import ID


def keep_step(folder: Path, batches: list[dict[str, Any]], model: nn.Module | None, about: dict[str, Any]) -> None:
    """Write the batch of a training step, the network and facts about the step into a folder.

    Args:
        folder: the folder, which gets `batch.safetensors`, `step.json` and the files of `model.save_pretrained`.
        batches: the micro-batches of the step. Their tensors are concatenated, or named NAME.0, NAME.1, ... if the
            sizes of their images differ.
        model: the network, or None if it is sharded over processes.
        about: the facts for `step.json`, to which the ids of the images are added.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name, value in batches[0].items() if isinstance(value, Tensor)]
    tensors = {}
    for name in names:
        parts = [batch[name] for batch in batches]
        if len({part.shape[1:] for part in parts}) == 1:
            tensors[name] = torch.cat(parts).contiguous()
        else:
            tensors |= {f"{name}.{number}": part.contiguous() for number, part in enumerate(parts)}
    save_file(tensors, folder / "batch.safetensors")
    if model is not None:
        model.save_pretrained(folder)
    text = json.dumps({**about, "images": images_of(batches)}, indent=2, ensure_ascii=False)
    (folder / "step.json").write_text(text + "\n", encoding="utf-8")


def images_of(batches: list[dict[str, Any]]) -> list[str]:
    """Return the ids of the images in the batches, if the batches have ids."""
    return [str(identifier) for batch in batches for identifier in batch.get(ID, [])]


def likely_cause(batches: list[dict[str, Any]], model: nn.Module) -> str:
    """Return a message about the most likely cause of the values that are not finite."""
    if not all(batch["pixel_values"].isfinite().all() for batch in batches):
        return "the images have values that are not finite"
    if not has_finite_weights(model):
        return "the weights of the network are not finite; try a lower learning_rate or max_grad_norm"
    return "the images and weights are finite; try a lower learning_rate, or bf16 or float32 instead of fp16"


def has_finite_weights(model: nn.Module) -> bool:
    """Tell whether all weights are finite. Each process checks its own part of sharded weights."""
    weights = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    return all(bool(part.isfinite().all()) for part in weights)
