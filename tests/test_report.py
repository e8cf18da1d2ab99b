"""The report in a real browser: Debian's chromium, headless. Without it they are skipped and say how to get it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_colorize.curves import Curve
from dist_colorize.evaluation import Evaluation
from dist_colorize.report import Comparison, Page, write_page, write_report
from dist_colorize.scoring import Scored

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
browser = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: apt-get install --no-install-recommends chromium, and run this test again"
)
NASTY = '<img src=x onerror="document.title=1">&"\'.jpg'
STAGES = ("gray", "raw", "blended", "final", "truth")


def page(name: str, classifies: bool = True, shift: float = 0.0) -> Page:
    """Three photographs of 40 x 40, PSNR 20, 10, 30 and SSIM 0.9, 0.8, 0.7."""
    photographs = []
    for i, (psnr, ssim) in enumerate(((20.0, 0.9), (10.0, 0.8), (30.0, 0.7))):
        scores = {stage: {"psnr": psnr + shift + n, "ssim": ssim} for n, stage in enumerate(STAGES[:-1])}
        pictures = {stage: np.full((40, 40, 3), 40 * n + 20, dtype=np.uint8) for n, stage in enumerate(STAGES)}
        calibration = np.zeros((15, 3))
        calibration[3] = (100, 30, 20)
        photographs.append(
            Scored(
                i,
                scores,
                1.0,
                {"top1": 20.0, "top5": 50.0} if classifies else {},
                calibration if classifies else None,
                pictures,
                np.full((20, 20), 128, dtype=np.uint8),
            )
        )
    return Page(name, Evaluation(photographs), {"data": "photos", "size": 40}, ["one.jpg", NASTY, "three.jpg"])


def chromium(path: Path, *options: str, address: str = "") -> str:
    assert CHROMIUM is not None
    profile = path.parent / "profile"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={profile}",
    ]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=4000", *options]
    done = subprocess.run(
        [*command, f"file://{path}{address}"], capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def act(path: Path, script: str) -> dict[str, str]:
    """The report with a script of ours behind it; it reports through data-* attributes of the body."""
    copy = path.with_name("acted.html")
    copy.write_text(path.read_text().replace("</body>", f"<script>{script}</script></body>"))
    body = re.search(r"<body([^>]*)>", chromium(copy, "--dump-dom"))
    assert body is not None
    return dict(re.findall(r'data-([a-z]+)="([^"]*)"', body[1]))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(path, [page("first"), page("second", classifies=False, shift=5)])
    return path


def test_report_is_one_file_that_asks_for_nothing_else(report: Path) -> None:
    text = report.read_text()
    assert re.findall(r"https?://[^\"' ]+", text) == [], "no address at all"
    assert "default-src 'none'" in text and text.count("</script>") == 2
    # the picture's bytes: WebP, lossy, of the right size and about the right level
    import base64
    import io

    first = re.search(r"data:image/webp;base64,([A-Za-z0-9+/=]+)", text)
    assert first is not None
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(first[1]))))
    assert picture.shape == (40, 40, 3) and abs(picture.mean() - 20) < 2


@browser
def test_tables_pictures_and_order(report: Path) -> None:
    dom = chromium(report, "--dump-dom")
    names = re.findall(r'data-name="([^"]*)"', dom)
    assert len(names) == 3 and names[0].startswith("&lt;img") and names[1:] == ["one.jpg", "three.jpg"], "worst first"
    assert "<title>Colorization report</title>" in dom, "the name of a photograph is text, never markup"
    for caption in ("grayscale", "raw", "smoothed", "final", "ground truth"):
        assert dom.count(f"<figcaption>{caption}</figcaption>") == 3
    assert dom.count('class="over"') == 3 and dom.count('type="range"') == 3
    assert "23.00 <small>" in dom and "calibration error" in dom and "photos" in dom
    by_ssim = chromium(report, "--dump-dom", address="#metric=ssim&stage=raw&run=1")
    assert re.findall(r'data-name="([^"]*)"', by_ssim)[0] == "three.jpg"
    assert (
        'class="over"' not in by_ssim and "calibration error" not in by_ssim.split('id="main"')[1].split("<script")[0]
    )


@browser
def test_keyboard_slider_and_overlay(report: Path) -> None:
    facts = act(
        report,
        """
        const key = (name, target) => (target ?? document.activeElement ?? document.body)
          .dispatchEvent(new KeyboardEvent("keydown", { key: name, bubbles: true, cancelable: true }));
        const at = () => document.activeElement.dataset?.name ?? "none";
        const note = document.body.dataset;
        key("j", document.body); key("j"); note.second = at();
        key("k"); note.first = at().slice(0, 4);
        key("ArrowRight"); key("ArrowRight");
        note.slider = document.activeElement.querySelector(".slide").style.getPropertyValue("--at");
        key("c"); note.unsure = document.body.classList.contains("unsure");
        note.shown = getComputedStyle(document.querySelector(".over")).display;
        key("]"); note.run = document.querySelector("h2").textContent;
        note.disabled = document.getElementById("unsure").disabled;
        key("["); note.back = document.querySelector("h2").textContent;
        const input = document.querySelector("input[type=range]");
        input.value = 10; input.dispatchEvent(new Event("input"));
        note.drag = getComputedStyle(document.querySelector(".slide .after")).clipPath;
        const metric = document.querySelectorAll(".bar select")[1];
        metric.value = "ssim"; metric.dispatchEvent(new Event("change"));
        note.worst = document.querySelector(".card").dataset.name;
        note.address = location.hash.includes("metric=ssim");
        """,
    )
    assert facts["second"] == "one.jpg" and facts["first"] == "&lt;img"
    assert facts["slider"] == "60%" and facts["drag"] == "inset(0px 0px 0px 10%)"
    assert facts["unsure"] == "true" and facts["shown"] == "block"
    assert facts["run"] == "Scores: second" and facts["disabled"] == "true" and facts["back"] == "Scores: first"
    assert facts["worst"] == "three.jpg" and facts["address"] == "true"


@browser
@pytest.mark.parametrize(("width", "columns"), [(1280, 5), (400, 2)])
def test_it_fits_the_screen(report: Path, width: int, columns: int) -> None:
    """In a frame of that width, as chromium has no narrow window: nothing hangs over, pictures in fewer columns."""
    frame = report.with_name(f"frame{width}.html")
    frame.write_text(
        f'<body style="margin:0"><iframe src="{report.name}" style="width:{width}px;height:3000px;border:0"></iframe>'
    )
    shot = report.with_name(f"{width}.png")
    chromium(frame, f"--window-size={max(width, 800)},3000", f"--screenshot={shot}")
    picture = np.asarray(Image.open(shot).convert("L")).astype(int)[:, :width]
    # the first strip is the one with the gray levels 20, 60, 100, 140, 180 of the pictures side by side
    found = max(sum((abs(row - level) <= 2).sum() > 60 for level in (20, 60, 100, 140, 180)) for row in picture)
    assert found == columns


@browser
def test_comparison_page(tmp_path: Path) -> None:
    curve = Curve("loss", [("a", [1, 10], [3.0, 1.0]), ("<b>", [1, 10], [4.0, 2.0])])
    path = tmp_path / "compare.html"
    settings = Comparison(["", "a", "<b>"], [["train.lr", "0.1", "0.2"]], [{"title": curve.title, "svg": curve.svg()}])
    write_page(path, "Comparison", [], settings)
    dom = chromium(path, "--dump-dom").split('id="main"')[1].split("<script")[0]
    assert "<td>train.lr</td><td>0.1</td><td>0.2</td>" in dom and "<th>&lt;b&gt;</th>" in dom
    assert dom.count("<polyline") == 2 and ">&lt;b&gt;</text>" in dom
