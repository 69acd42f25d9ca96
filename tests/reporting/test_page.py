"""The page in a real browser: drag, tap, press keys, and compare what is shown with Python."""

from __future__ import annotations

import base64
import shutil
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from deepvision.evaluation.pictures import normalised, pixels
from deepvision.reporting import explorer, figures, records, sections
from deepvision.reporting.analysis import RunAnalysis, ValidationImages
from deepvision.reporting.document import Document

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SIZES = {"desktop": (1280, 900), "telephone": (390, 800)}


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
    if not CHROMIUM:
        pytest.skip("needs Chromium: apt-get install chromium")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def analysis(our_run, sample_root):
    """A linear network on averaged pixels, fitted to the images: quick to attack."""
    (run,) = records.read_runs([our_run])
    images = ValidationImages(sample_root, 0)
    x, y = images.images(range(len(images.dataset)))
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(16), nn.Flatten(), nn.Linear(192, 10))
    optimizer = torch.optim.Adam(net.parameters(), 0.03)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    run.__dict__["network"] = net.eval()
    return RunAnalysis(run, images, images.predict(net, "net"))


@pytest.fixture(scope="module", autouse=True)
def small_grid():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(explorer, "EPSILONS", (0, 1, 4, 16))
        patch.setattr(explorer, "STEPS", (1, 2, 5))
        patch.setattr(explorer, "PROBED", 20)
        yield


@pytest.fixture(scope="module")
def page_file(analysis, tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    writer = sections.FigureWriter(folder)
    content = [
        sections.provenance([analysis.run]),
        sections.curves([analysis.run], writer),
        sections.attack_explorer(analysis),
        sections.confusion(analysis, writer),
    ]
    file = folder / "report.html"
    file.write_text(Document("Report", "", content).html(), encoding="utf-8")
    return file


@pytest.fixture(params=SIZES)
def page(request, browser, page_file):
    width, height = SIZES[request.param]
    size = {"width": width, "height": height}
    touch = request.param == "telephone"
    context = browser.new_context(viewport=size, has_touch=touch, offline=True)
    context.set_default_timeout(120_000)
    page = context.new_page()
    page.mistakes = []
    page.on("pageerror", lambda error: page.mistakes.append(str(error)))
    page.on("console", lambda m: page.mistakes.append(m.text) if m.type == "error" else None)
    page.goto(page_file.as_uri())
    page.wait_for_selector(".explorer[data-ready]")
    yield page
    context.close()
    assert page.mistakes == []


def part(page, name):
    return page.locator(f'[data-part="{name}"]')


def drag_to(page, name, share):
    """Drag the thumb of a slider to a share of its width."""
    slider = part(page, name)
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    low, high = (float(slider.get_attribute(a)) for a in ("min", "max"))
    now = (float(slider.input_value()) - low) / (high - low)
    y = box["y"] + box["height"] / 2
    inner = box["width"] - 16  # the thumb stays inside
    page.mouse.move(box["x"] + 8 + now * inner, y)
    page.mouse.down()
    page.mouse.move(box["x"] + 8 + share * inner, y, steps=4)
    page.mouse.up()


def canvas(page, name):
    """The pixels (H, W, 3) that a canvas shows."""
    address = part(page, name).evaluate("c => c.toDataURL('image/png')")
    data = np.frombuffer(base64.b64decode(address.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1]


def attacked(a, n, epsilon, steps):
    """The n-th image of the explorer, clean and attacked, computed again: (H, W, 3) each."""
    x, y = a.images.images(explorer.choose(a)[0])
    attack = replace(explorer.ATTACK, epsilon=epsilon, steps=steps)
    return pixels(x)[n], pixels(attack.perturb(a.run.network, x, y))[n]


def assert_shown(page, a, n, clean, image):
    """The pictures and the words on the page are those of this image."""
    assert np.array_equal(canvas(page, "clean"), clean)
    assert np.array_equal(canvas(page, "attacked"), image)
    change = image.astype(int) - clean
    factor = 127 // max(1, abs(change).max())
    assert part(page, "factor").inner_text() == str(factor)
    assert np.array_equal(canvas(page, "difference"), 128 + factor * change)
    label = a.predictions.labels[explorer.choose(a)[0][n]]
    for name, shown in (("before", clean), ("after", image)):
        p = a.logits(normalised(shown[None])).softmax(1)[0]
        bars = part(page, name).locator("li").all_inner_texts()
        for text, k in zip(bars, p.topk(3).indices.tolist(), strict=True):
            true = " (true class)" if k == label else ""
            assert text.strip().startswith(f"{a.predictions.names[k]}{true} ")
            assert float(text.split()[-2]) == pytest.approx(100 * p[k].item(), abs=0.06)
    holds = p.argmax() == label
    assert part(page, "status").inner_text().startswith("Holds" if holds else "Fooled")


def test_dragging_shows_what_python_computes(page, analysis):
    drag_to(page, "epsilon", 1)
    drag_to(page, "steps", 0)
    clean, image = attacked(analysis, 0, explorer.EPSILONS[-1], explorer.STEPS[0])
    assert_shown(page, analysis, 0, clean, image)
    value = float(part(page, "status").inner_text().split("attack: ")[1].split(" %")[0])
    expected = explorer.accuracies(analysis)["grid"][-1][0]
    assert value == pytest.approx(expected, abs=0.06)
    pressed = part(page, "heat").locator("[aria-pressed=true]")
    assert pressed.count() == 1 and pressed.get_attribute("aria-label") == "epsilon 16, 1 steps"
    drag_to(page, "epsilon", 0)
    assert_shown(page, analysis, 0, clean, clean)


def test_another_image_and_the_assignments_attack(page, analysis):
    n = len(explorer.choose(analysis)[0]) - 1
    page.locator(".choice label").nth(n).click()
    part(page, "default").check()
    x, _ = analysis.images.images(explorer.choose(analysis)[0])
    image = pixels(explorer.default_attack(analysis.run.network, x))[n]
    assert_shown(page, analysis, n, pixels(x)[n], image)
    page.keyboard.press("Tab")
    part(page, "epsilon").focus()
    part(page, "epsilon").press("ArrowLeft")  # a slider leaves the assignment's attack
    assert not part(page, "default").is_checked()
    assert part(page, "epsilon").get_attribute("aria-valuetext") == "4"


def test_cells_of_the_heat_map_are_buttons(page, analysis, request):
    cell = part(page, "heat").locator('button[data-e="2"][data-s="1"]')
    cell.tap() if "telephone" in request.node.name else cell.click()
    clean, image = attacked(analysis, 0, explorer.EPSILONS[2], explorer.STEPS[1])
    assert_shown(page, analysis, 0, clean, image)
    shown = [float(t) for t in part(page, "heat").locator("button").all_inner_texts()]
    grid = np.ravel(explorer.accuracies(analysis)["grid"])
    assert shown == pytest.approx(grid, abs=0.51)


def test_pointing_at_the_confusion_matrix_names_the_cell(page, analysis):
    p = analysis.predictions
    frame = page.locator("figure.hover .frame").last
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    drawing = figures.confusion_block(p)
    left, top, width, height = figures.axes_box(drawing)
    i, j, k = 2, 3, len(p.present)
    x = box["x"] + box["width"] * (left + width * (j + 0.5) / k)
    page.mouse.move(x, box["y"] + box["height"] * (top + height * (i + 0.5) / k))
    lines = page.locator("figure.hover output").last.inner_text().splitlines()
    assert lines[:2] == [f"true: {p.names[i]}", f"predicted: {p.names[j]}"]
    assert lines[2].startswith(f"{p.confusion[i, j]} of {p.confusion[i].sum()} images")
    frame.press("ArrowLeft")
    lines = page.locator("figure.hover output").last.inner_text().splitlines()
    assert lines[1] == f"predicted: {p.names[j - 1]}"


def test_pointing_at_a_curve_shows_its_values(page, analysis):
    figure = page.locator("figure.hover").nth(2)  # top-1
    frame = figure.locator(".frame")
    frame.scroll_into_view_if_needed()
    box = frame.bounding_box()
    left, top, width, height = figures.axes_box(figures.curve_panel([analysis.run], "top1"))
    page.mouse.move(
        box["x"] + box["width"] * (left + 0.99 * width),
        box["y"] + box["height"] * (top + 0.5 * height),
    )
    epoch, value = analysis.run.val_top1[-1]
    lines = figure.locator("output").inner_text().splitlines()
    assert lines[0] == f"SimpleNet, validation: {float(f'{value:.5g}')} % (epoch {epoch})"


def test_nothing_is_wider_than_the_screen(page):
    width = page.viewport_size["width"]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    boxes = page.evaluate(
        "[...document.querySelectorAll('.scroll')].map(e => e.scrollWidth - e.clientWidth)"
    )
    assert max(boxes) <= 0


def test_the_page_is_small_enough(page_file):
    assert page_file.stat().st_size <= 8e6
