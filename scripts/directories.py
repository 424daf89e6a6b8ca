"""Checkpoint directories that are written: what all writers do alike."""

import shutil
from pathlib import Path

import torch

from scripts import checkpoint
from scripts.files import Refusal


def check_finite(stored: dict[str, torch.Tensor], tensor: str) -> None:
    """Raise Refusal where a number is none, or the scale of a group with such a number in it."""
    for part in stored.values():
        is_code = part.dtype.itemsize == 1
        if not is_code and not torch.stack(part.aminmax()).isfinite().all():
            raise Refusal(f"{tensor} has NaN, inf or numbers too large, expected finite ones")


def copy_files(source: Path, work: Path) -> None:
    """Those beside the weights: what is in them, for they may be closed to writing."""
    for pattern in ("*.json", "*.jinja", "*.model", "*.txt", "additional_chat_templates/*.jinja"):
        for path in source.glob(pattern):
            if path.name not in ("config.json", checkpoint.INDEX) and path.is_file():
                copy = work / path.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(path, copy)
