"""The quickstart's photographs and the opening of a recipe's data."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage
from PIL import Image

from dist_colorize.data.config import DataConfig
from dist_colorize.data.photos import SAMPLES, open_photographs, sample_photographs
from dist_colorize.errors import UserError


def do(work: Callable[[], Any], stop: Any) -> Any:
    return work()


WORLD: Any = SimpleNamespace(rank=0, size=1, local_size=1, wait_for=do)
STOP: Any = SimpleNamespace(requested=False)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dist_colorize"


def test_the_samples_are_scikit_images_photographs(cache: Path) -> None:
    folder = sample_photographs()
    assert folder == cache / "sample-photographs"
    assert {file.name for file in folder.iterdir()} == set(SAMPLES)
    for name in SAMPLES:
        assert (folder / name).read_bytes() == (Path(skimage.__file__).parent / "data" / name).read_bytes()
    inode = folder.stat().st_ino
    assert sample_photographs().stat().st_ino == inode  # copied once
    (folder / SAMPLES[0]).unlink()
    assert {file.name for file in sample_photographs().iterdir()} == set(SAMPLES)
    assert [entry.name for entry in cache.iterdir()] == ["sample-photographs"]  # no litter


def test_samples_that_cannot_be_kept_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        sample_photographs()


def test_the_default_recipe_trains_and_validates_on_the_samples() -> None:
    training, validation = open_photographs(DataConfig(), WORLD, STOP)
    assert {training.name(row) for row in range(len(training))} == set(SAMPLES)
    assert validation.fingerprint == training.fingerprint


def test_validation_is_a_split_or_a_root_of_its_own(tmp_path: Path) -> None:
    for i in range(8):
        noise = np.random.default_rng(i).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        path = tmp_path / ("train" if i < 6 else "val") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(noise).save(path)
    root, val_root = str(tmp_path / "train"), str(tmp_path / "val")
    index_dir = str(tmp_path / "indexes")
    training, validation = open_photographs(DataConfig(root=root, val_root=val_root, index_dir=index_dir), WORLD, STOP)
    assert (len(training), len(validation)) == (6, 2)
    assert len(list(Path(index_dir).iterdir())) == 2
    training, validation = open_photographs(DataConfig(root=root, val_fraction=0.5), WORLD, STOP)
    assert len(training) + len(validation) == 6
    assert len(training) * len(validation) > 0


def test_an_index_that_this_node_does_not_see_is_named(tmp_path: Path) -> None:
    elsewhere: Any = SimpleNamespace(wait_for=lambda work, stop: (tmp_path / "on another node", "fingerprint"))
    with pytest.raises(UserError, match=r"data\.index_dir"):
        open_photographs(DataConfig(), elsewhere, STOP)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("root", ""),
        ("val_fraction", 1.0),
        ("val_fraction", -0.1),
        ("crop", 100),
        ("crop", 0),
        ("min_side", 0),
        ("scale", (0.0, 1.0)),
        ("scale", (0.5, 0.4)),
        ("scale", (0.5, 1.5)),
        ("ratio", (2.0, 1.0)),
        ("ratio", (0.0, 1.0)),
        ("threads", 0),
        ("readers", 0),
        ("hw_decoder_load", -0.1),
        ("hw_decoder_load", 1.5),
        ("prefetch", 0),
    ],
)
def test_impossible_settings_name_their_key(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=key):
        DataConfig(**{key: value})
