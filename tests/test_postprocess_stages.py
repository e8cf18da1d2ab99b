"""Presets: what comes with the package loads, what is wrong is named, stages run in order."""

from __future__ import annotations

import pytest
import torch

from dist_colorize.errors import UserError
from dist_colorize.postprocess.cpu import TorchBackend
from dist_colorize.postprocess.stages import (
    Blend,
    Preset,
    Repair,
    bilinear_taps,
    decode_and_run,
    load_preset,
    preset_names,
    run,
)

NAMES = {"none", "temperature", "blur", "blend", "suppress_red", "suppress_saturation", "repair", "final"}


def test_every_preset_of_the_package_runs():
    assert set(preset_names()) == NAMES
    torch.manual_seed(0)
    ab, confidence = torch.randn(2, 2, 7, 9) * 40, torch.rand(2, 7, 9)
    for name in NAMES:
        results = run(load_preset(name), TorchBackend(), ab, confidence)
        assert results[0] == ("raw", ab)
        assert all(torch.isfinite(result).all() for _, result in results)
        assert name in ("none", "temperature") or not torch.equal(results[-1][1], ab)


def test_final_blends_and_then_repairs():
    final = load_preset("final")
    assert final.temperature == 0.38
    assert [stage.label for stage in final.stages] == ["blended", "repaired"]
    features, weight, bias = torch.randn(1, 8, 6, 6), torch.randn(313, 8), torch.zeros(313)
    results, confidence = decode_and_run(final, TorchBackend(), features, weight, bias)
    assert [label for label, _ in results] == ["raw", "blended", "repaired"]
    assert confidence.shape == (1, 6, 6)


def test_a_preset_file_of_ones_own(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("temperature: 0.5\nstages:\n  - blend: {sigma: 1, low: 0.2, high: 0.3}\n  - repair\n")
    assert load_preset(file) == Preset(temperature=0.5, stages=(Blend(sigma=1.0, low=0.2, high=0.3), Repair()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("temperature: 0\n", ["temperature", "0.001"]),
        ("temprature: 0.4\n", ["temprature", "temperature"]),
        ("- blend\n", ["temperature", "stages"]),
        ("stages: {blend: {}}\n", ["stages", "list"]),
        ("stages: [sharpen]\n", ["stage 1", "sharpen", "blend"]),
        ("stages: [blend, {repair: {radius: 0}}]\n", ["stage 2", "radius", "1..16"]),
        ("stages: [{blend: {low: 0.5, high: 0.2}}]\n", ["stage 1", "low", "high"]),
        ("stages: [{blend: {sgima: 2}}]\n", ["stage 1", "sgima", "sigma"]),
        ("stages: [{repair: {min_neighbours: 25}}]\n", ["min_neighbours", "24"]),
        ("stages: [{scale_chroma: {hue: .nan}}]\n", ["hue"]),
        ("stages: [\n", ["YAML"]),
        ("\tstages: []\n", ["YAML"]),
    ],
)
def test_a_wrong_preset_is_named(tmp_path, text, words):
    file = tmp_path / "wrong.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_preset(file)
    assert all(word in str(caught.value) for word in [*words, "wrong.yaml"]), str(caught.value)


def test_an_unknown_preset_lists_the_known_ones(tmp_path):
    for name in ("finale", str(tmp_path / "missing.yaml")):
        with pytest.raises(UserError, match="suppress_red"):
            load_preset(name)


def test_bilinear_taps_of_a_strip_are_those_of_the_whole():
    left, right, share = bilinear_taps(7, 1000, 0, 1000)
    part = bilinear_taps(7, 1000, 333, 100)
    assert (part[0] == left[333:433]).all()
    assert (part[2] == share[333:433]).all()
    assert right.max() == 6
    assert left.min() == 0
