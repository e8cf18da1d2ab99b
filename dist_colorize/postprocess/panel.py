"""Pictures side by side under their captions: what a person looks at to judge a result."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from dist_colorize.postprocess.colorizer import Colorizer, Prediction
from dist_colorize.postprocess.images import Photograph

TILE = 384
"""Longest side of a picture in a panel, in pixels."""


def panel(colorizer: Colorizer, photograph: Photograph, prediction: Prediction) -> np.ndarray:
    """grayscale | raw | after each stage | ground truth (where the photograph is in colour): uint8 [H, W, 3]."""
    height, width = photograph.size
    shrink = min(1.0, TILE / max(height, width))
    size = max(1, round(height * shrink)), max(1, round(width * shrink))
    pixels = photograph.shrunk(*size)
    small = Photograph(pixels if pixels.dtype == np.uint8 else (pixels >> 8).astype(np.uint8), None)
    neutral = prediction.raw.new_zeros(2, 1, 1)
    pictures = [("grayscale", colorizer.paint(small, neutral))]
    pictures += [(label, colorizer.paint(small, ab)) for label, ab in prediction.stages]
    if photograph.in_color():
        pictures.append(("ground truth", small.pixels))
    return captioned(pictures)


def captioned(pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """(caption, uint8 [H, W, 3] all of one size) -> one uint8 picture, left to right."""
    height, width = pictures[0][1].shape[:2]
    font = ImageFont.load_default(14)
    column = max(width, *(int(font.getlength(caption)) + 8 for caption, _ in pictures))
    sheet = Image.new("RGB", (column * len(pictures), height + 24), "white")
    draw = ImageDraw.Draw(sheet)
    for place, (caption, picture) in enumerate(pictures):
        sheet.paste(Image.fromarray(picture), (place * column + (column - width) // 2, 24))
        draw.text((place * column + column // 2, 12), caption, fill="black", anchor="mm", font=font)
    return np.asarray(sheet)
