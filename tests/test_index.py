"""The index: what is found, what is left out and why, and that it is exactly what DALI can decode."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def
from PIL import Image

from dist_colorize import index
from dist_colorize.data import pipeline
from dist_colorize.data.catalog import build_index, ensure_index, index_folder, index_of, is_fresh, rejections
from dist_colorize.data.columns import Photographs, open_index, write_columns
from dist_colorize.data.inspect import FORMATS, Facts
from dist_colorize.data.scan import Candidate, read_part
from dist_colorize.errors import Interrupted, UserError
from dist_colorize.text import printable


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Smooth colour noise, different for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def build(root: Path, min_side: int = 32) -> tuple[Photographs, dict[str, str]]:
    """The index of `root`, kept beside it, and what was left out: name -> reason."""
    folder = build_index(root, min_side, root.parent / "index")
    return open_index(folder), dict(rejections(folder))


def names(photographs: Photographs) -> set[str]:
    return {photographs.name(row) for row in range(len(photographs))}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "good.jpg").write_bytes(encoded(picture()))
    return folder


def animated(format: str) -> bytes:
    return encoded(picture(), format, save_all=True, append_images=[picture(seed=1)])


GRAY = picture().convert("L")
BAD = {
    "empty.jpg": (b"", "empty"),
    "text.jpg": (b"hello, I am a text\n", "not an image"),
    "half.jpg": (encoded(picture(400, 300))[:3000], "cannot be decoded"),
    "half.png": (encoded(picture(400, 300), "PNG")[:9000], "cannot be decoded"),
    "half.webp": (encoded(picture(400, 300), "WEBP")[:1000], "cannot be decoded"),
    "half.tif": (encoded(picture(400, 300), "TIFF")[:9000], "cannot be decoded"),
    "half.bmp": (encoded(picture(400, 300), "BMP")[:9000], "cannot be decoded"),
    "no end mark.jpg": (encoded(picture())[:-2], "cannot be decoded"),
    "header only.png": (encoded(picture(), "PNG")[:40], "cannot be decoded"),
    "magic only.jpg": (b"\xff\xd8\xff\xe0", "cannot be decoded"),
    "tiny.png": (encoded(picture(1, 1), "PNG"), "too small: 1x1"),
    "line.png": (encoded(picture(1, 5000), "PNG"), "too small: 1x5000"),
    "strip.png": (encoded(picture(40, 4000), "PNG"), "too elongated: 40x4000"),
    "gray.jpg": (encoded(GRAY), "grayscale: one channel"),
    "gray 16 bit.png": (encoded(Image.fromarray(np.full((64, 64), 9, dtype=np.uint16)), "PNG"), "grayscale"),
    "gray alpha.png": (encoded(GRAY.convert("LA"), "PNG"), "grayscale: one channel"),
    "black and white.png": (encoded(GRAY.convert("1"), "PNG"), "grayscale: one channel"),
    "gray in three channels.jpg": (encoded(GRAY.convert("RGB")), "grayscale: no pixel has colour"),
    "gray palette.png": (encoded(GRAY.convert("P"), "PNG"), "grayscale: no pixel has colour"),
    "animation.gif": (animated("GIF"), "GIF is not supported"),
    "animation.webp": (animated("WEBP"), "animated WebP is not supported"),
    "new.avif": (encoded(picture(), "AVIF"), "AVIF is not supported"),
    "called.jpg": (animated("GIF"), "GIF is not supported"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_files_are_left_out_with_the_reason(root: Path, name: str) -> None:
    content, reason = BAD[name]
    (root / name).write_bytes(content)
    photographs, rejected = build(root)
    assert names(photographs) == {"good.jpg"}
    assert list(rejected) == [name]
    assert rejected[name].startswith(reason)
    assert "\n" not in rejected[name]


def test_special_files_links_and_loops_are_survived(root: Path) -> None:
    (root / "folder").mkdir()
    (root / "folder" / "inner.jpg").write_bytes(encoded(picture(seed=1)))
    elsewhere = root.parent / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "far.jpg").write_bytes(encoded(picture(seed=2)))
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(root / "socket.jpg"))
    (root / "nothing.jpg").symlink_to(root / "missing.jpg")
    (root / "itself.jpg").symlink_to(root / "itself.jpg")
    (root / "a loop").symlink_to(root)
    (root / "folder" / "up").symlink_to("..")
    (root / "an alias").symlink_to(root / "folder")
    (root / "linked").symlink_to(elsewhere)
    (root / "link.jpg").symlink_to(elsewhere / "far.jpg")
    photographs, rejected = build(root)
    assert names(photographs) == {"good.jpg", "folder/inner.jpg", "linked/far.jpg", "link.jpg"}
    assert rejected.pop("pipe.jpg") == "a named pipe, not a file"
    assert rejected.pop("socket.jpg") == "a socket, not a file"
    assert rejected.pop("nothing.jpg") == "a broken symlink"
    assert "symbolic links" in rejected.pop("itself.jpg")
    assert set(rejected) == {"a loop", "folder/up", "an alias"}
    assert all("listed already" in reason for reason in rejected.values())


def test_names_of_any_bytes_and_duplicates_in_other_folders(root: Path) -> None:
    wanted = [
        "with space.jpg",
        "größe 彩色.jpg",
        "new\nline.jpg",
        "a/same.jpg",
        "b/same.jpg",
        "CAPITALS.JPG",
        "no suffix",
    ]
    wanted.append(os.fsdecode(b"latin \xe9\xff.jpg"))
    for i, name in enumerate(wanted):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(encoded(picture(seed=i + 1)))
    (root / "captions.txt").write_text("not an image, and not called like one")
    (root / "Makefile").write_text("neither")
    photographs, rejected = build(root)
    assert names(photographs) == {*wanted, "good.jpg"}
    assert not rejected
    for row in range(len(photographs)):
        assert photographs.read(row) == (root / photographs.name(row)).read_bytes()
    assert all("\n" not in printable(name) and printable(name).isprintable() for name in wanted)


def test_an_eight_thousand_pixel_photograph_is_used(root: Path) -> None:
    (root / "large.jpg").write_bytes(encoded(picture(8000, 6000), quality=50))
    photographs, rejected = build(root)
    assert not rejected
    assert (8000, 6000) in zip(photographs.width.tolist(), photographs.height.tolist(), strict=True)


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def usable_files() -> dict[str, bytes]:
    image = picture(90, 60)
    alpha = image.copy()
    alpha.putalpha(128)
    files = {
        "plain.jpg": encoded(image),
        "progressive.jpg": encoded(image, progressive=True),
        "cmyk.jpg": encoded(image.convert("CMYK")),
        "full chroma.jpg": encoded(image, subsampling=0),
        "trailing.jpg": encoded(image) + b"a camera's own data",
        "palette.png": encoded(image.quantize(16), "PNG"),
        "alpha.png": encoded(alpha, "PNG"),
        "interlaced.png": encoded(image, "PNG", interlace=1),
        "animated.png": animated("PNG"),
        "lossless.webp": encoded(alpha, "WEBP", lossless=True),
        "lzw.tif": encoded(image, "TIFF", compression="tiff_lzw"),
        "jpeg.tif": encoded(image, "TIFF", compression="jpeg"),
        "pages.tif": encoded(image, "TIFF", save_all=True, append_images=[picture(40, 40)]),
        "plain.bmp": encoded(image, "BMP"),
        "palette.bmp": encoded(image.quantize(16), "BMP"),
        "alpha.bmp": encoded(alpha, "BMP"),
    }
    for orientation in range(1, 9):
        for suffix, format in {"jpg": "JPEG", "png": "PNG", "tif": "TIFF", "webp": "WEBP"}.items():
            files[f"turned {orientation}.{suffix}"] = encoded(image, format, exif=turned(orientation))
    return files


def test_what_the_index_accepts_dali_decodes_at_that_size(root: Path) -> None:
    """The oracle for width and height is DALI itself: crops are anchored in its frame."""
    for name, content in usable_files().items():
        (root / name).write_bytes(content)
    photographs, rejected = build(root)
    assert not rejected
    assert names(photographs) == {*usable_files(), "good.jpg"}
    everything = [np.frombuffer(photographs.read(row), dtype=np.uint8) for row in range(len(photographs))]

    @pipeline_def(batch_size=len(everything), num_threads=1, device_id=None, prefetch_queue_depth=1)
    def sizes() -> Any:
        return fn.peek_image_shape(fn.external_source(lambda: everything))

    shapes = np.array(sizes().run()[0].as_tensor())
    decoder = pipeline.CropDecoder("cpu", None)
    for row, (height, width) in enumerate(shapes[:, :2].tolist()):
        assert (photographs.width[row], photographs.height[row]) == (width, height), photographs.name(row)
        assert decoder.decode(everything[row], 0, 0, height, width).shape == (height, width, 3)


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def shard(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> None:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members.items():
            add(archive, name, content)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_shards_are_read_where_they_lie(root: Path, format: int) -> None:
    (root / "train").mkdir()
    long_name = "long/" * 16 + "x" * 90 + ".png"
    members = {
        "0001.jpg": encoded(picture(seed=1)),
        "0001.json": b"{}",
        "../escape.jpg": encoded(picture(seed=2)),
        "0002.webp": encoded(picture(seed=3), "WEBP"),
        "0003.jpg": b"",
        "0004.jpg": b"no image",
        long_name: encoded(picture(seed=4), "PNG"),
    }
    if format != tarfile.USTAR_FORMAT:
        members["ü" * 120 + ".jpg"] = encoded(picture(seed=5))
    shard(root / "train" / "a.tar", members, format)
    before = sorted(root.rglob("*"))
    photographs, rejected = build(root)
    assert sorted(root.rglob("*")) == before
    usable = {name for name, content in members.items() if len(content) > 50}
    assert names(photographs) == {f"train/a.tar/{name}" for name in usable} | {"good.jpg"}
    assert rejected == {"train/a.tar/0003.jpg": "empty: zero bytes", "train/a.tar/0004.jpg": "not an image"}
    for row in range(len(photographs)):
        name = photographs.name(row).removeprefix("train/a.tar/")
        assert photographs.read(row) == members.get(name, (root / "good.jpg").read_bytes())


@pytest.mark.parametrize("cut", ["in a member", "in a header", "between members", "in the padding"])
def test_a_shard_that_was_cut_off_gives_what_is_whole(root: Path, cut: str) -> None:
    members = {f"{i}.jpg": encoded(picture(seed=i)) for i in range(4)}
    shard(root / "a.tar", members, tarfile.USTAR_FORMAT)
    with tarfile.open(root / "a.tar") as archive:
        third = archive.getmembers()[2]
    end = {
        "in a member": third.offset_data + third.size // 2,
        "in a header": third.offset + 100,
        "between members": third.offset,
        "in the padding": third.offset_data + third.size + 1,
    }[cut]
    assert (third.offset_data + third.size) % 512 not in (0, 511)  # or there is no padding to cut
    os.truncate(root / "a.tar", end)
    photographs, rejected = build(root)
    whole = 3 if cut == "in the padding" else 2
    assert names(photographs) == {f"a.tar/{i}.jpg" for i in range(whole)} | {"good.jpg"}
    assert "cut off" in rejected["a.tar"]
    assert ("a.tar/2.jpg" in rejected) == (cut == "in a member")


def test_a_damaged_header_ends_a_shard_with_a_reason(root: Path) -> None:
    shard(root / "a.tar", {f"{i}.jpg": encoded(picture(seed=i)) for i in range(3)}, tarfile.USTAR_FORMAT)
    with tarfile.open(root / "a.tar") as archive:
        second = archive.getmembers()[1].offset
    with (root / "a.tar").open("r+b") as file:
        file.seek(second + 100)
        file.write(b"\xff" * 60)
    photographs, rejected = build(root)
    assert names(photographs) == {"a.tar/0.jpg", "good.jpg"}
    assert rejected["a.tar"].startswith("cut off or damaged near byte")


def test_other_archives_and_links_in_shards_are_named(root: Path) -> None:
    with tarfile.open(root / "small.tar.gz", "w:gz") as archive:
        add(archive, "1.jpg", encoded(picture()))
    (root / "hidden.tar").write_bytes((root / "small.tar.gz").read_bytes())
    (root / "noise.tar").write_bytes(b"noise" * 500)
    (root / "empty.tar").write_bytes(b"")
    with tarfile.open(root / "link.tar", "w") as archive:
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    photographs, rejected = build(root)
    assert names(photographs) == {"good.jpg"}
    assert "unpack it to a plain .tar" in rejected.pop("small.tar.gz")
    assert "a link" in rejected.pop("link.tar/link.jpg")
    assert set(rejected) == {"hidden.tar", "noise.tar", "empty.tar"}
    assert all(reason.startswith("not a plain tar archive") for reason in rejected.values())


def many(root: Path, count: int) -> None:
    for i in range(count):
        (root / f"{i:03}.jpg").write_bytes(encoded(picture(48, 40, seed=i)))


def test_the_split_is_by_file_and_stays_when_others_come(root: Path) -> None:
    many(root, 120)
    training, validation = build(root)[0].split(0.25)
    assert names(training).isdisjoint(names(validation))
    assert len(training) + len(validation) == 121
    assert 15 <= len(validation) <= 46  # binomial, five standard deviations
    assert training.fingerprint != validation.fingerprint
    for row in (0, len(training) - 1):
        assert training.read(row) == (root / training.name(row)).read_bytes()
    for i in range(120, 160):
        (root / f"{i:03}.jpg").write_bytes(encoded(picture(48, 40, seed=i)))
    more_training, more_validation = build(root)[0].split(0.25)
    assert names(training) < names(more_training)
    assert names(validation) < names(more_validation)


def test_small_splits_have_two_sides_or_an_error(root: Path) -> None:
    photographs = build(root)[0]
    assert len(photographs.split(0.0)[0]) == 1
    assert len(photographs.split(0.0)[1]) == 0
    with pytest.raises(UserError, match="val_fraction"):
        photographs.split(0.5)
    many(root, 2)
    photographs = build(root)[0]
    assert [len(side) for side in photographs.split(1e-6)] == [2, 1]
    assert [len(side) for side in photographs.split(0.999999)] == [1, 2]


def test_the_fingerprint_is_of_the_data_not_of_the_place(root: Path, tmp_path: Path) -> None:
    many(root, 5)
    original = build(root)[0].fingerprint
    moved = tmp_path / "elsewhere" / "photos"
    moved.parent.mkdir()
    root.rename(moved)
    assert build(moved)[0].fingerprint == original
    (moved / "002.jpg").write_bytes(encoded(picture(48, 41, seed=2)))
    changed = build(moved)[0].fingerprint
    (moved / "002.jpg").rename(moved / "other.jpg")
    assert len({original, changed, build(moved)[0].fingerprint}) == 3


def test_columns_are_mapped_not_loaded(root: Path) -> None:
    photographs = build(root)[0]
    for column in (photographs.names, photographs.offset, photographs.key):
        base: Any = column
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(min_size=1, max_size=60).filter(lambda name: b"\0" not in name), max_size=30, min_size=1))
def test_rows_keep_their_facts_and_are_sorted_by_hash(
    tmp_path_factory: pytest.TempPathFactory, raw: list[bytes]
) -> None:
    rows = [(Candidate(os.fsdecode(name), -1, 3 * i, 7 * i), Facts(i + 1, i + 2, i % 5)) for i, name in enumerate(raw)]
    folder = tmp_path_factory.mktemp("columns")
    about = write_columns(folder, "/data", [], rows)
    columns = {
        field: np.load(folder / f"{field}.npy")
        for field in Photographs.__dataclass_fields__
        if field not in about and field != "index"
    }
    photographs = Photographs("/data", about["fingerprint"], about["fingerprint"], (), **columns)
    expected = {(c.name, c.offset, c.length, f.width, f.height, f.format) for c, f in rows}
    got = {
        (
            photographs.name(row),
            *(int(getattr(photographs, field)[row]) for field in ("offset", "length", "width", "height", "format")),
        )
        for row in range(len(photographs))
    }
    assert got == expected
    assert (np.diff(photographs.key.astype(object)) >= 0).all()
    assert [photographs.format_name(row) for row in range(len(raw))] == [FORMATS[f] for f in photographs.format]


def test_an_index_is_built_once_and_again_when_files_come_go_or_a_shard_changes(root: Path) -> None:
    parent = root.parent / "index"
    (root / "inner").mkdir()
    shard(root / "a.tar", {"1.jpg": encoded(picture(seed=1))})

    def count() -> int:
        assert is_fresh(index_folder(root, 32, parent)) == (build_time() is not None)
        return len(open_index(ensure_index(root, 32, parent)))

    def build_time() -> int | None:
        folder = index_folder(root, 32, parent)
        return (folder / "index.json").stat().st_ino if is_fresh(folder) else None

    assert count() == 2
    first = build_time()
    assert first is not None
    assert count() == 2
    assert build_time() == first
    (root / "inner" / "new.jpg").write_bytes(encoded(picture(seed=3)))
    assert count() == 3
    (root / "inner" / "new.jpg").unlink()
    assert count() == 2
    shard(root / "a.tar", {f"{i}.jpg": encoded(picture(seed=i)) for i in range(3)})
    assert count() == 4
    assert index_folder(root, 64, parent) != index_folder(root, 32, parent)
    (index_folder(root, 32, parent) / "key.npy").write_bytes(b"damaged")
    assert count() == 4


def test_earlier_indexes_are_found_by_their_fingerprint_for_a_while(root: Path) -> None:
    parent = root.parent / "index"
    folder = ensure_index(root, 32, parent)
    first = open_index(folder)
    assert index_of(folder, first.fingerprint) == folder
    fingerprints = [first.fingerprint]
    for i in range(6):
        (root / f"{i}.jpg").write_bytes(encoded(picture(seed=i)))
        fingerprints.append(open_index(ensure_index(root, 32, parent)).fingerprint)
        found = index_of(folder, first.fingerprint)  # whoever asks again keeps it
        assert found is not None and found != folder
        again = open_index(found)
        assert (again.fingerprint, names(again)) == (first.fingerprint, {"good.jpg"})
    known = [index_of(folder, fingerprint) for fingerprint in fingerprints]
    assert [place is not None for place in known] == [True, False, False, True, True, True, True]
    assert sorted(parent.iterdir()) == sorted(place for place in known if place)
    build_index(root, 32, parent)  # the same content is not kept twice
    assert len(list(parent.iterdir())) == 5
    assert names(first) == {"good.jpg"}  # open all the time
    assert index_of(folder, "another") is None


def checkered(one: tuple[int, int, int], other: tuple[int, int, int]) -> Image.Image:
    """96 x 64 pixels in squares of 16, two colours in turn."""
    squares = np.add.outer(np.arange(64) // 16, np.arange(96) // 16) % 2
    return Image.fromarray(np.where(squares[..., None] == 0, one, other).astype(np.uint8))


@pytest.mark.parametrize("format", ["PNG", "BMP"])
def test_the_faintest_colour_counts_and_noise_does_not(root: Path, format: str) -> None:
    """Also where the mean of all pixels is gray, and where colour is in one corner alone."""
    corner = checkered((90, 90, 90), (90, 90, 90))
    corner.paste((120, 90, 90), (0, 0, 16, 16))
    pictures = {
        "opposite colours": (checkered((100, 100, 40), (40, 40, 100)), True),
        "in one corner": (corner, True),
        "a little": (checkered((100, 102, 105), (100, 102, 105)), True),
        "noise": (checkered((100, 102, 104), (104, 102, 100)), False),
    }
    for name, (image, _) in pictures.items():
        (root / f"{name}.{format.lower()}").write_bytes(encoded(image, format))
    photographs, rejected = build(root)
    for name, (_, usable) in pictures.items():
        assert (f"{name}.{format.lower()}" in names(photographs)) == usable
        assert (f"{name}.{format.lower()}" in rejected) != usable


def test_the_colour_of_a_small_spot_in_a_jpeg_counts(root: Path) -> None:
    """JPEGs are looked at in means of 8 x 8 pixels."""
    image = checkered((90, 90, 90), (130, 130, 130))
    image.paste((160, 60, 60), (40, 40, 46, 46))
    (root / "spot.jpg").write_bytes(encoded(image, quality=95))
    assert "spot.jpg" in names(build(root)[0])


def test_an_index_kept_below_the_data_does_not_make_itself_stale(root: Path) -> None:
    folder = ensure_index(root, 32, root / ".cache" / "index")
    assert is_fresh(folder)
    assert names(open_index(folder)) == {"good.jpg"}


def test_several_processes_may_build_at_the_same_time(root: Path) -> None:
    many(root, 30)
    with ThreadPoolExecutor(4) as pool:
        folders = list(pool.map(lambda _: build_index(root, 32, root.parent / "index"), range(8)))
    assert len(set(folders)) == 1
    assert len(open_index(folders[0])) == 31
    assert [entry.name for entry in (root.parent / "index").iterdir()] == [folders[0].name]


def test_a_stop_leaves_the_old_index_and_no_litter(root: Path) -> None:
    parent = root.parent / "index"
    folder = build_index(root, 32, parent)
    many(root, 50)
    calls = iter(range(1000))
    with pytest.raises(Interrupted):
        build_index(root, 32, parent, stop=lambda: next(calls) > 5)
    assert len(open_index(folder)) == 1
    assert list(parent.iterdir()) == [folder]


def test_unusable_roots_are_named_with_a_remedy(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parent = tmp_path / "index"
    with pytest.raises(UserError, match=r"nowhere.*check data\.root"):
        build_index(tmp_path / "nowhere", 32, parent)
    with pytest.raises(UserError, match="not a folder"):
        build_index(root / "good.jpg", 32, parent)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="no photographs here"):
        build_index(empty, 32, parent)
    (empty / "notes.txt").write_text("text")
    with pytest.raises(UserError, match="none of its 1 files is called like one"):
        build_index(empty, 32, parent)
    (empty / "gray.png").write_bytes(encoded(GRAY, "PNG"))
    with pytest.raises(UserError, match=r"(?s)no usable photograph.*1  grayscale.*gray\.png: grayscale"):
        build_index(empty, 32, parent)
    with pytest.raises(UserError, match=r"cannot write the index.*index_dir"):
        build_index(root, 32, root / "good.jpg" / "index")

    # Tests may run as root, whom no mode of a file keeps out: the refusal is played.
    scandir = os.scandir

    def refuse(path: Any) -> Any:
        if Path(path).name in ("photos", "locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot list the data folder: Permission denied; check its permissions"):
        build_index(root, 32, parent)
    (tmp_path / "open" / "locked").mkdir(parents=True)
    (tmp_path / "open" / "1.jpg").write_bytes(encoded(picture()))
    photographs, rejected = build(tmp_path / "open")
    assert len(photographs) == 1
    assert rejected == {"locked": "cannot list the folder: Permission denied"}


def test_a_file_without_read_permission_is_left_out(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (root / "locked.jpg").write_bytes(encoded(picture()))
    original = os.open

    def refuse(path: Any, *rest: Any, **more: Any) -> int:
        if Path(path).name == "locked.jpg":
            raise PermissionError(13, "Permission denied")
        return original(path, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    assert build(root)[1] == {"locked.jpg": "cannot be read: Permission denied"}


def test_a_full_disk_is_named_and_leaves_no_litter(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write the index \(No space left on device\)"):
        build(root)
    assert list((root.parent / "index").iterdir()) == []


def test_reading_notices_what_changed(root: Path) -> None:
    path = root / "good.jpg"
    size = path.stat().st_size
    assert read_part(path, 0, size, whole=True) == path.read_bytes()
    assert read_part(path, 5, 7, whole=False) == path.read_bytes()[5:12]
    for offset, count, whole in ((0, size - 1, True), (0, size + 1, True), (size - 3, 4, False)):
        with pytest.raises(OSError, match="changed since it was indexed"):
            read_part(path, offset, count, whole)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no longer a regular file"):
        read_part(path, 0, size, whole=True)


def command(*arguments: str | Path, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dist_colorize.index", *map(str, arguments)],
        env=os.environ | {"XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_command_sums_up_and_leaves_with_the_right_code(root: Path, tmp_path: Path) -> None:
    many(root, 3)
    (root / "gray\n1.png").write_bytes(encoded(GRAY, "PNG"))
    (root / "gray2.png").write_bytes(encoded(GRAY, "PNG"))
    (root / "caption.txt").write_text("text")
    done = command(root, "--list-rejected", cache=tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    assert "usable: 4 photographs (JPEG 4)" in done.stdout
    assert "left out: 2\n         2  grayscale\n" in done.stdout
    assert "gray\\n1.png: grayscale: one channel\n" in done.stdout
    assert "other files: 1" in done.stdout
    assert "6/6" in done.stderr  # the bar
    assert (tmp_path / "cache" / "dist_colorize" / "index").is_dir()
    assert "up to date" in command(root, cache=tmp_path / "cache").stdout

    failed = command(tmp_path / "cache", cache=tmp_path / "cache")
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'cache'}: no photographs here")
    assert "Traceback" not in failed.stderr


def test_help_teaches_and_does_not_wait_for_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        index.main(["--help"])
    assert left.value.code == 0
    text = capsys.readouterr().out
    for word in (
        "python -m dist_colorize.index /photos",
        "--min-side",
        "--rebuild",
        "--list-rejected",
        "--output",
        "data.index_dir",
    ):
        assert word in text
    loaded = "import sys, dist_colorize.index; print('torch' in sys.modules or 'nvidia.dali' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True).stdout == "False\n"
    )


def test_no_thread_is_left_behind(root: Path) -> None:
    build(root)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("index")]
