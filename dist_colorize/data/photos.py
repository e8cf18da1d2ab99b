"""The photographs of a recipe, indexed and split; and those that come with scikit-image, for the quickstart."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from dist_colorize.data.catalog import cache_folder, ensure_index, index_folder, index_of, is_fresh
from dist_colorize.data.columns import Photographs, describe, open_index
from dist_colorize.data.config import SAMPLE_ROOT, DataConfig
from dist_colorize.distributed import World
from dist_colorize.errors import UserError
from dist_colorize.stopping import StopFlag

SAMPLES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "hubble_deep_field.jpg",
    "motorcycle_left.png",
    "motorcycle_right.png",
    "retina.jpg",
    "rocket.jpg",
)
"""The colour photographs in scikit-image's wheel: CC0 or public domain (its data/README.txt names the sources)."""


def open_photographs(
    config: DataConfig, world: World, stop: StopFlag, begun_with: tuple[str | None, str | None] = (None, None)
) -> tuple[Photographs, Photographs]:
    """(training, validation) photographs of a recipe; a collective call.

    Rank 0 builds an index that is missing or out of date, with a progress bar. Without `val_root` and `val_fraction`
    the training photographs are also the validation ones. Raises UserError on all ranks when the data cannot be used,
    and Interrupted when a signal ends the scan.

    `begun_with`: the indexes (`Photographs.index`) that a resumed run began with. They are opened while the cache has
    them, even if files have come, gone or turned bad since: to the run those are faults like any other.
    """
    training = _open(config.root, config, world, stop, begun_with[0])
    if config.val_root is not None:
        return training, _open(config.val_root, config, world, stop, begun_with[1])
    return training.split(config.val_fraction) if config.val_fraction else (training, training)


def sample_photographs() -> Path:
    """A folder with the photographs of scikit-image's wheel, copied into the user's cache on the first call."""
    folder = cache_folder() / SAMPLE_ROOT
    if all((folder / name).is_file() for name in SAMPLES):
        return folder
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise UserError(
            f"data.root={SAMPLE_ROOT} needs scikit-image: pip install scikit-image, or name a folder of photographs"
        )
    source = Path(spec.origin).parent / "data"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".samples.", dir=folder.parent) as temporary:
            for name in SAMPLES:
                shutil.copyfile(source / name, Path(temporary) / name)
            new = Path(temporary)
            new.chmod(0o755)
            if folder.is_dir():  # incomplete: someone removed a file
                folder.rename(new.with_name(new.name + ".old"))
                shutil.rmtree(new.with_name(new.name + ".old"), ignore_errors=True)
            with suppress(OSError):  # another process was faster
                new.rename(folder)
            # TemporaryDirectory removes its folder, which has another name by now, or is not needed.
            new.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot copy scikit-image's photographs here ({error.strerror or error}); "
            "make room, or set XDG_CACHE_HOME to a writable folder"
        ) from error
    return folder


def _open(root: str, config: DataConfig, world: World, stop: StopFlag, begun_with: str | None) -> Photographs:
    parent = Path(config.index_dir) if config.index_dir is not None else None

    def work() -> tuple[Path, str]:
        folder = sample_photographs() if root == SAMPLE_ROOT else Path(root)
        index = begun_with and index_of(index_folder(folder, config.min_side, parent), begun_with)
        if not index:
            index = ensure_index(folder, config.min_side, parent, progress=True, stop=lambda: stop.requested)
        elif not is_fresh(index):
            print(f"{folder} has changed; the run goes on with the list of photographs that it began with", flush=True)
        return index, describe(index)["fingerprint"]

    folder, fingerprint = world.wait_for(work, stop)
    index = index_of(folder, fingerprint)  # another process may have built a newer one by now
    if index is None:
        raise UserError(
            f"{folder}: rank 0 has indexed the data here; set data.index_dir to a folder that all nodes see"
        )
    return open_index(index)
