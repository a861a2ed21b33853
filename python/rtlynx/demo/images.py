"""Picture tensors to PIL images and contact sheets."""

from __future__ import annotations

import torch
from PIL import Image


def to_pil(pictures: torch.Tensor) -> list[Image.Image]:
    """Pictures (n, 3, h, w) in [-1, 1] to RGB images."""
    pixels = ((pictures.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(picture) for picture in pixels.permute(0, 2, 3, 1).cpu().numpy()]


def contact_sheet(pictures: torch.Tensor, columns: int, zoom: int = 2, gap: int = 4) -> Image.Image:
    """All pictures on one white sheet, row by row, each enlarged without smoothing."""
    images = to_pil(pictures)
    width, height = images[0].width * zoom, images[0].height * zoom
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        enlarged = image.resize((width, height), Image.Resampling.NEAREST)
        sheet.paste(enlarged, (gap + column * (width + gap), gap + row * (height + gap)))
    return sheet
