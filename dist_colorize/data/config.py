"""Where the photographs are and how they are cut: the `data` section of a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

SAMPLE_ROOT = "sample-photographs"
"""The data.root that means the photographs of scikit-image's wheel."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the photographs are and how they are cut."""

    root: str = SAMPLE_ROOT
    """Folder tree of images or tar shards (WebDataset layout); sample-photographs: those of scikit-image's wheel."""
    val_root: str | None = None
    """A folder of its own for validation; null: `val_fraction` of `root`."""
    val_fraction: float = 0.0
    """Share of `root` kept for validation, chosen by a hash of the name; 0: validates on the training photographs."""
    crop: int = 224
    """Side of the square that the network sees, in pixels; a multiple of 16."""
    min_side: int = 32
    """Images with a shorter side than this are left out, in pixels."""
    scale: tuple[float, float] = (0.35, 1.0)
    """Least and greatest share of a photograph's area that a random crop takes."""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """Least and greatest width / height of a random crop, before it is resized to a square."""
    flip: bool = True
    """Mirror half of the crops."""
    threads: int | None = None
    """Threads that decode, per rank; null: the machine's cores divided by its ranks."""
    readers: int = 16
    """Threads that read files, per rank; more than cores, as most of a read from a network file system is waiting."""
    prefetch: int = 2
    """Batches made ready ahead of the training step."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where images are decoded; auto: where the rank trains, or on the CPU where a GPU fails a trial at the start."""
    hw_decoder_load: float = 0.0
    """Share of the JPEGs that a GPU's JPEG engine decodes. 0: that of Hopper and newer GPUs ignores the order of CUDA
    streams, and while other kernels run its pixels can be silently wrong."""
    max_bad: float = 0.05
    """Share of the photographs that may turn out bad during training (one always may); beyond it the run stops."""
    index_dir: str | None = None
    """Folder that keeps the index of `root`; null: the user's cache folder."""

    def __post_init__(self) -> None:
        if not self.root:
            raise ValueError("root must name a folder")
        if not 0.0 <= self.val_fraction < 1.0:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        if self.crop < 16 or self.crop % 16:
            raise ValueError(f"crop must be a positive multiple of 16, got {self.crop}")
        if self.min_side < 1:
            raise ValueError(f"min_side must be at least 1 pixel, got {self.min_side}")
        if not 0.0 < self.scale[0] <= self.scale[1] <= 1.0:
            raise ValueError(f"scale must be two shares, 0 < least <= greatest <= 1, got {list(self.scale)}")
        if not 0.0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio must be two numbers, 0 < least <= greatest, got {list(self.ratio)}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1 or null, got {self.threads}")
        if self.readers < 1:
            raise ValueError(f"readers must be at least 1, got {self.readers}")
        if not 0.0 <= self.hw_decoder_load <= 1.0:
            raise ValueError(f"hw_decoder_load must be a share from 0 to 1, got {self.hw_decoder_load}")
        if not 0.0 <= self.max_bad <= 1.0:
            raise ValueError(f"max_bad must be a share from 0 to 1, got {self.max_bad}")
        if self.prefetch < 1:
            raise ValueError(f"prefetch must be at least 1 batch, got {self.prefetch}")
