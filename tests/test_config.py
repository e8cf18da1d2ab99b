"""Config files: exact round trips, and for each mistake an error that names key, place and remedy."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_colorize import config
from dist_colorize.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Data:
    root: str = "photos"
    """Folder of photographs,
    or of tar shards."""
    crop: int = 224
    """Side of the training crop, pixels; a multiple of 16."""
    scale: tuple[float, float] = (0.35, 1.0)
    index_dir: Path | None = None
    device: Literal["auto", "cpu", "gpu"] = "auto"
    flip: bool = True

    def __post_init__(self) -> None:
        if self.crop % 16:
            raise ValueError(f"crop must be a multiple of 16, got {self.crop}")
        if self.scale[0] > self.scale[1]:
            raise ValueError("the lower end of scale must not exceed the upper")


@dataclass(frozen=True, kw_only=True)
class Stage:
    sigma: float
    label: str = "blended"


@dataclass(frozen=True, kw_only=True)
class Train:
    steps: int = 100
    """Optimizer steps of the whole run."""
    learning_rate: float = 1e-3
    threads: int | None = None
    milestones: list[int] = field(default_factory=list)
    stages: list[Stage] = field(default_factory=list)
    precision: Literal["auto", "fp32", "bf16"] = "auto"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    name: str = "run"


@dataclass(frozen=True, kw_only=True)
class Demanding:
    data: Stage


def load(tmp_path: Path, text: str, *overrides: str) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return config.load(Recipe, path, overrides)


def complaint(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(tmp_path, text, *overrides)
    return str(caught.value).replace(f"{tmp_path}/", "")


# ---------------------------------------------------------------- what works


def test_a_file_fills_the_tree_and_the_rest_keeps_its_defaults(tmp_path: Path) -> None:
    text = """
    data: {root: /photos, scale: [0.5, 1], index_dir: cache, device: gpu, flip: false}
    train:
        learning_rate: 1e-4
        milestones: [10, 20]
        stages: [{sigma: 2}, {sigma: 1.5, label: repaired}]
    """
    assert load(tmp_path, text) == Recipe(
        data=Data(root="/photos", scale=(0.5, 1.0), index_dir=Path("cache"), device="gpu", flip=False),
        train=Train(
            learning_rate=1e-4, milestones=[10, 20], stages=[Stage(sigma=2.0), Stage(sigma=1.5, label="repaired")]
        ),
    )
    assert isinstance(load(tmp_path, "data: {scale: [0, 1]}").data.scale[0], float)


@pytest.mark.parametrize("text", ["", "---\n", "# nothing\n", "data:\n", "data: {}\ntrain:\n"])
def test_an_empty_file_or_section_is_all_defaults(tmp_path: Path, text: str) -> None:
    assert load(tmp_path, text) == Recipe()


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("train.learning_rate=3e-4", "train", "learning_rate", 3e-4),
        ("train.learning_rate=1", "train", "learning_rate", 1.0),
        ("train.threads=4", "train", "threads", 4),
        ("train.threads=null", "train", "threads", None),
        ("train.milestones=[1, 2]", "train", "milestones", [1, 2]),
        ("data.scale=[0.1, 0.2]", "data", "scale", (0.1, 0.2)),
        ("data.flip=no", "data", "flip", False),
        ("data.root=2024", "data", "root", "2024"),
        ("data.root=no", "data", "root", "no"),
        ("data.root=null", "data", "root", "null"),
        ("data.root=/my photos/[1]: a=b", "data", "root", "/my photos/[1]: a=b"),
        ("data.root='quoted'", "data", "root", "quoted"),
        ("data.index_dir=7", "data", "index_dir", Path("7")),
    ],
)
def test_an_override_wins_and_is_read_as_the_type_of_its_key(
    tmp_path: Path, override: str, section: str, key: str, value: object
) -> None:
    text = "data: {root: a, flip: true}\ntrain: {steps: 1, threads: 2}\n"
    found = getattr(getattr(load(tmp_path, text, override), section), key)
    assert found == value
    assert type(found) is type(value) or isinstance(value, Path)


def test_the_last_of_two_overrides_wins(tmp_path: Path) -> None:
    assert load(tmp_path, "", "train.steps=1", "train.steps=2").train.steps == 2


# Lone surrogates too, as file names have them, and the line breaks of Unicode that YAML 1.1 folds.
texts = st.sampled_from(["\x85", "a\u2028b", "\u2029", "\ufeff", "\r", "'\n", "1:30", "~", "=", "---"]) | st.text(
    st.characters(codec=None, exclude_categories=[]), max_size=20
)
numbers = st.floats(allow_nan=False)


@given(
    root=texts,
    crop=st.integers(-(2**70), 2**70).map(lambda n: n * 16),
    scale=st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair))),
    index_dir=st.none() | st.text(st.characters(exclude_characters="\0"), min_size=1).map(Path),
    learning_rate=numbers,
    threads=st.none() | st.integers(),
    milestones=st.lists(st.integers()),
    stages=st.lists(st.builds(Stage, sigma=numbers, label=texts), max_size=3),
    name=texts,
)
def test_what_is_dumped_reads_back_equal(
    root: str, crop: int, scale: tuple[float, float], index_dir: Path | None, learning_rate: float, threads: int | None,
    milestones: list[int], stages: list[Stage], name: str,
) -> None:  # fmt: skip
    recipe = Recipe(
        data=Data(root=root, crop=crop, scale=scale, index_dir=index_dir),
        train=Train(learning_rate=learning_rate, threads=threads, milestones=milestones, stages=stages),
        name=name,
    )
    mapping, _ = config._parse(config.dump(recipe), "dump")
    assert config.build(Recipe, mapping, "dump") == recipe


def test_help_names_every_key_with_type_default_and_meaning() -> None:
    text = config.describe(Recipe)
    assert "data.crop: int = 224\n    Side of the training crop, pixels; a multiple of 16." in text
    assert "data.root: str = photos\n    Folder of photographs, or of tar shards." in text
    assert "data.scale: [float, float] = [0.35, 1.0]\n" in text
    assert "data.index_dir: Path|null = null\n" in text
    assert "train.precision: auto|fp32|bf16 = auto" in text
    assert "data.sigma: float (required)" in config.describe(Demanding)


# ---------------------------------------------------------------- what does not


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {stesp: 5}", "recipe.yaml, line 1: unknown key train.stesp; did you mean train.steps?"),
        ("\n\nstep: 5", "recipe.yaml, line 3: unknown key step; did you mean train.steps?"),
        ("trian:\n  steps: 5", "recipe.yaml, line 1: unknown key trian; did you mean train?"),
        ("train: {crop: 32}", "recipe.yaml, line 1: unknown key train.crop; did you mean data.crop?"),
        ("data: {xqzw: 1}", "valid keys here: root, crop, scale, index_dir, device, flip"),
        ("train:\n  steps: [1, 2]", "recipe.yaml, line 2: train.steps must be a whole number, got the list [1, 2]"),
        ("train: {steps: 1.5}", "train.steps must be a whole number, got 1.5"),
        ("train: {steps: true}", "train.steps must be a whole number, got true"),
        ("train: {steps: five}", 'train.steps must be a whole number, got the text "five"'),
        ("train: {steps: }", "train.steps must be a whole number, got null"),
        ("train: {learning_rate: false}", "train.learning_rate must be a number, got false"),
        ("train: {learning_rate: .nan}", "train.learning_rate must be a number, got .nan"),
        ("train: {threads: 1.0}", "train.threads must be a whole number, got 1.0"),
        ("train: {milestones: [1, x]}", 'train.milestones[1] must be a whole number, got the text "x"'),
        ("train: {milestones: 3}", "train.milestones must be a list of int, got 3"),
        ("train: {stages: [{sigma: 1}, {}]}", "train.stages[1].sigma is required and missing"),
        ("data: {scale: [1]}", "data.scale must be a list of 2 values [float, float], got the list [1]"),
        ("data: {flip: 1}", "data.flip must be true or false, got 1"),
        ("data: {device: gpus}", 'data.device must be one of auto, cpu, gpu, got the text "gpus"; did you mean gpu?'),
        ("data: {root: no}", "data.root must be text, got false; put text in quotes"),
        ("data: [1]", "data must be a section of `key: value` lines, got the list [1]"),
        ("data: {crop: 100}", "recipe.yaml, line 1: data.crop must be a multiple of 16, got 100"),
        ("data:\n  scale: [1, 0]", "recipe.yaml, line 1: data: the lower end of scale must not exceed the upper"),
        ("- 1\n- 2", "recipe.yaml: a config file is a list of `key: value` lines, got the list [1, 2]"),
        ("train:\n\tsteps: 5", "recipe.yaml, line 2: not valid YAML"),
        ("train:\n\tsteps: 5", "spaces, never tabs"),
        ("train: {steps: 5", "recipe.yaml, line 1: not valid YAML"),
        ("train: {steps: 5}\ntrain: {steps: 6}", 'recipe.yaml, line 2: not valid YAML: "train" is given twice'),
        ("train: !!python/object:os.system {}", "recipe.yaml, line 1: not valid YAML"),
        ("train: &x {steps: *x}", "train.steps must be a whole number, got a section"),
        ("1: 2", "recipe.yaml, line 1: unknown key 1"),
        ("[" * 3000, "recipe.yaml: nested too deeply"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_is_named(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in complaint(tmp_path, text)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=five", 'override train.steps=five: train.steps must be a whole number, got the text "five"'),
        ("train.stesp=5", "override train.stesp=5: unknown key train.stesp; did you mean train.steps?"),
        ("steps=5", "did you mean train.steps?"),
        ("train.steps.x=5", "unknown key train.steps.x"),
        ("train.steps", 'override "train.steps": write it as key=value'),
        ("train=5", "train is a section; give one of its keys, e.g. train.steps=VALUE"),
        ("data.crop=100", "override data.crop=100: data.crop must be a multiple of 16, got 100"),
        ("data.scale=[1, 2", 'data.scale must be a list of 2 values [float, float], got the text "[1, 2"'),
    ],
)
def test_a_mistake_in_an_override_is_named(tmp_path: Path, override: str, expected: str) -> None:
    assert expected in complaint(tmp_path, "data: {crop: 32}", override)


def test_a_wrong_file_keeps_its_place_in_the_message_when_overrides_are_given(tmp_path: Path) -> None:
    assert "recipe.yaml, line 1: data must be a section" in complaint(tmp_path, "data: 3", "data.crop=32")


def test_build_names_its_source() -> None:
    with pytest.raises(UserError, match=r"^preset final: unknown key sigmas; did you mean sigma\?$"):
        config.build(Stage, {"sigmas": 1}, "preset final")
    with pytest.raises(UserError, match=r"^preset final: sigma is required and missing$"):
        config.build(Stage, {}, "preset final")


def test_unreadable_files_are_named_with_the_nearest_that_exists(tmp_path: Path) -> None:
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(UserError, match=r"quikstart.yaml; did you mean .*quickstart.yaml\?"):
        config.load(Recipe, tmp_path / "quikstart.yaml")
    with pytest.raises(UserError, match="cannot read the config file"):
        config.load(Recipe, tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        config.load(Recipe, tmp_path / "binary.yaml")


def test_infinity_is_a_number(tmp_path: Path) -> None:
    assert math.isinf(load(tmp_path, "train: {learning_rate: .inf}").train.learning_rate)
