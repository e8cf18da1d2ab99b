"""The command that scores trained runs: what it writes, several runs at once, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_colorize.errors import UserError
from dist_colorize.evaluate import main
from dist_colorize.metrics import METRICS


@pytest.mark.slow
def test_two_methods_are_scored_and_reported_side_by_side(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from dist_colorize.train import main as train

    small = ["data.crop=32", "model.width=0.0625", "train.steps=2", "train.global_batch=4", "train.validate_every=0"]
    runs = [tmp_path / "final", tmp_path / "mse=1"]  # a folder may hold an equals sign
    train([*small, f"run.dir={runs[0]}"])
    quick = json.loads((runs[0] / "evaluation.json").read_text())
    train([*small, "model.method=mse", f"run.dir={runs[1]}"])
    capfd.readouterr()
    main([*map(str, runs), "--report", "evaluate.pictures=3"])
    shown = capfd.readouterr().out
    assert "photographs are: the training photographs" in shown and "size: 32" in shown and "warning" not in shown
    for run in runs:
        result = json.loads((run / "evaluation.json").read_text())
        assert list(result["scores"]) == ["gray", "raw", "blended", "final"]
        assert result["scores"]["final"].keys() == {*METRICS} - {"top1", "top5", "ece"}
        assert result["scores"].keys() == result["intervals"].keys()
        assert ("classifier" in result) == (run == runs[0])
        assert all(result["protocol"][name] == METRICS[name].meaning for name in result["scores"]["final"])
        lines = [json.loads(line) for line in (run / "photographs.jsonl").read_text().splitlines()]
        assert len(lines) == 8 and len({line["name"] for line in lines}) == 8
        assert (run / "panels" / "final.png").is_file()
    # training's own quick evaluation says the same of the same network
    again = json.loads((runs[0] / "evaluation.json").read_text())["scores"]
    assert quick["scores"]["final"]["psnr"] == pytest.approx(again["final"]["psnr"], rel=1e-9)
    report = (runs[0] / "report.html").read_text()
    assert report.count('"images"') == 6 and "mse=1" in report and not (runs[1] / "report.html").exists()
    main([*map(str, runs), "evaluate.preset=none", "evaluate.pictures=0"])
    assert list(json.loads((runs[1] / "evaluation.json").read_text())["scores"]) == ["gray", "raw", "final"]


def test_bad_requests_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="name at least one run"):
        main(["evaluate.preset=none"])
    with pytest.raises(UserError, match=r"config\.yaml"):
        main([str(tmp_path)])
    with pytest.raises(SystemExit):
        main([])
