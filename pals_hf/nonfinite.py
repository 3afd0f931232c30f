"""What is kept of a training step whose loss or gradient is not finite, so that it can be looked into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .data import ID


def keep_step(folder: Path, batches: list[dict[str, Any]], model: nn.Module | None, about: dict[str, Any]) -> None:
    """Write the images of a step as tensors, the network that got them, and what is known of the step.

    Args:
        folder: `batch.safetensors`, `step.json` and, with a model, what its `save_pretrained` writes.
        batches: micro-batches; their tensors are joined along the first axis, or called NAME.0, NAME.1, ... where
            their crops differ in size.
        model: the network, where this process has all of it.
        about: for `step.json`, with the images' ids where the batches have any.
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
    return [str(identifier) for batch in batches for identifier in batch.get(ID, [])]


def likely_cause(batches: list[dict[str, Any]], model: nn.Module) -> str:
    """What to look at first."""
    if not all(batch["pixel_values"].isfinite().all() for batch in batches):
        return "the images hold values that are not finite"
    # Of sharded weights this process looks at its own part.
    weights = (p.to_local() if hasattr(p, "to_local") else p for p in model.parameters())
    if not all(part.isfinite().all() for part in weights):
        return "the network's weights are not finite any more: lower learning_rate or max_grad_norm"
    return "images and weights are finite: lower learning_rate, or train in bf16 or float32 if this is fp16"
