"""Tuning: the space of presets, the search on a made-up network whose best temperature is known, the command."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_colorize.color.gamut import BINS, bin_centers
from dist_colorize.data import Batch
from dist_colorize.errors import Interrupted
from dist_colorize.postprocess.stages import Blend, Preset, Repair, build_preset, load_preset, preset_names
from dist_colorize.postprocess.tune import SCORES, Trials, search
from dist_colorize.postprocess.tune_space import TEMPERATURES, Space, as_yaml


class Known:
    """A network whose logits are those of Gaussians of width 12 around the true colours at temperature 1."""

    def __init__(self) -> None:
        self.head = SimpleNamespace(weight=torch.eye(BINS)[:, :, None, None], bias=torch.zeros(BINS))

    def features(self, lightness: torch.Tensor) -> torch.Tensor:
        colours = truth(len(lightness))[:, :, ::2, ::2].movedim(1, -1)[..., None, :]
        return (-(colours - torch.tensor(bin_centers()).float()).square().sum(-1) / (2 * 12**2)).movedim(-1, 1)


def truth(count: int) -> torch.Tensor:
    small = torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(2)) * 25
    return small.repeat_interleave(8, -1).repeat_interleave(8, -2)


@pytest.fixture
def trials() -> Trials:
    network: Any = Known()
    lightness = torch.full((3, 1, 32, 32), 60.0)
    return Trials(network, [Batch(lightness, truth(3), torch.ones(3), torch.arange(3))])


def test_search_finds_the_temperature_that_sharpens_without_stages(trials: Trials) -> None:
    """By brute force over the grid; the space has this one number."""
    start = Preset(temperature=1.6)
    scored = {t: trials.mse_ab(trials.run(Preset(temperature=t))) for t in TEMPERATURES}
    best, after, before, made = search(trials, start, "mse_ab", 120)
    assert best.temperature == min(scored, key=lambda t: scored[t]) and not best.stages
    assert after == pytest.approx(min(scored.values())) and before == pytest.approx(scored[1.6]) and made > 0


def test_search_is_never_worse_than_its_start_and_seeded(trials: Trials) -> None:
    start = Preset(temperature=0.38, stages=(Blend(), Repair()))
    first, again = (search(trials, start, "psnr", 40) for _ in range(2))
    assert first == again and first[1] >= first[2]
    assert [type(stage) for stage in first[0].stages] == [Blend, Repair]


def test_each_score_prefers_the_truth(trials: Trials) -> None:
    for name, score in SCORES.items():
        exact, off = score(trials, trials.ab), score(trials, trials.ab.flip(-1) + 20)
        assert exact >= off if name == "psnr" else exact <= off, name


def test_a_signal_ends_the_search(trials: Trials) -> None:
    asked = iter([False, False, True])
    with pytest.raises(Interrupted, match="nothing was written"):
        search(trials, load_preset("final"), "psnr", 40, stop=lambda: next(asked))


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(preset_names()), st.lists(st.floats(0, 1), min_size=20, max_size=20))
def test_every_point_of_the_space_is_a_preset_that_its_file_gives_back(name: str, shares: list[float]) -> None:
    space = Space(load_preset(name))
    bounds = space.bounds()
    assert len(bounds) == len(space.whole()) == len(space.vector())
    assert all(low <= value <= high for value, (low, high) in zip(space.vector(), bounds, strict=True))
    preset = space.preset([low + share * (high - low) for share, (low, high) in zip(shares, bounds, strict=False)])
    assert build_preset(yaml.safe_load(as_yaml(preset, "two\nlines")), "test") == preset


def test_the_start_is_a_point_of_the_space_but_for_its_temperature() -> None:
    start = load_preset("final")
    near = Space(start).preset(Space(start).vector())
    assert near.stages == start.stages and near.temperature == pytest.approx(start.temperature, rel=0.06)


@pytest.mark.slow
def test_command_writes_a_preset_and_prints_the_gain(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from dist_colorize.errors import UserError
    from dist_colorize.postprocess.__main__ import main as postprocess
    from dist_colorize.train import main as train

    small = ["data.crop=32", "model.width=0.0625", "train.steps=2", "train.global_batch=4", "train.validate_every=0"]
    train([*small, f"run.dir={tmp_path / 'run'}"])
    assert postprocess(["tune", "--checkpoint", str(tmp_path / "run"), "--trials", "40"]) == 0
    shown = capfd.readouterr().out
    assert "on the 4 photographs held back" in shown and "ms each" in shown and "PSNR (dB)" in shown
    assert load_preset(tmp_path / "run" / "tuned.yaml").stages
    train([*small, "model.method=mse", f"run.dir={tmp_path / 'mse'}"])
    with pytest.raises(UserError, match="nothing to tune"):
        postprocess(["tune", "--checkpoint", str(tmp_path / "mse")])
