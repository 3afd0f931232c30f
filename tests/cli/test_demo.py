"""`pals-hf demo` in a real browser and a real server on loopback."""

import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from deep_pictures import values_of
from launching import call
from PIL import Image
from trained import NAMES, patches, save_checkpoint

from pals_hf.cli import demo
from pals_hf.data import Scaling
from pals_hf.errors import InputError
from pals_hf.inference import load_for_inference, predict
from pals_hf.models import build_image_processor
from pals_hf.visualize import overlay

gradio = pytest.importorskip("gradio", reason="needs the extra `demo`")
webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium")

from selenium.common.exceptions import WebDriverException  # noqa: E402

from pals_hf.cli import page as demo_page  # noqa: E402

APP = Path(__file__).parents[2] / "examples" / "app.py"
CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))
PATIENCE = 60  # seconds: a machine may be busy


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Write two checkpoints with different predictions."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("ce", "pals")):
        torch.manual_seed(seed)
        save_checkpoint(folder / name)
    return folder


@contextmanager
def serving(folder, *arguments):
    """Start the app in a process of its own, and yield its address."""
    command = [sys.executable, str(APP), *map(str, arguments)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "GRADIO_TEMP_DIR": str(folder / "gradio")}
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, cwd=folder, env=environment)
        try:
            found = (re.search(r"http://127\.0\.0\.1:\d+", line) for line in process.stdout)
            address = next(filter(None, found), None)
            assert address, (folder / "log").read_text()
            yield address[0]
        finally:
            process.terminate()
            process.communicate()


@contextmanager
def browsing(folder):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    switches = ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking")
    for switch in (*switches, "disable-component-update", "disable-sync", "window-size=1300,1700"):
        options.add_argument(f"--{switch}")
    options.add_argument(f"--user-data-dir={folder / 'profile'}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        yield Page(browser)
    finally:
        browser.quit()


class Page:
    """The actions and the view of a user."""

    def __init__(self, browser):
        self.browser = browser

    def find(self, selector):
        return self.browser.find_elements("css selector", selector)

    def wait_for(self, seen):
        """Wait until `seen` returns something true, and return it."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            # The page may replace an element while the test reads it.
            with suppress(WebDriverException):
                if found := seen():
                    return found
            time.sleep(0.2)
        raise AssertionError(f"waited in vain; the page: {self.text()}")

    def text(self):
        return self.find("body")[0].text

    def upload(self, path):
        self.wait_for(lambda: self.find("input[type=file]"))[0].send_keys(str(path))

    def press(self, name):
        next(button for button in self.find("button") if button.text.strip() == name).click()

    def pictures(self):
        """Return the visible pictures, top to bottom, as the server sent them."""
        shown = [image.get_attribute("src") for image in self.find(".image-frame img") if image.is_displayed()]
        return [Image.open(io.BytesIO(urllib.request.urlopen(url).read())).convert("RGB") for url in shown]

    def table(self):
        """Return the table of classes, row by row."""
        cells = {cell.get_attribute("data-testid"): cell.text for cell in self.find("[data-testid^=cell-]")}
        rows = sorted({int(name.split("-")[1]) for name in cells})
        return [[cells[f"cell-{row}-{column}"] for column in range(3)] for row in rows]

    def foreign_requests(self):
        """Return the addresses of requests to other servers."""
        messages = [json.loads(entry["message"])["message"] for entry in self.browser.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        return [url for url in urls if url.startswith(("http", "ws")) and not re.match(r"\w+://127\.0\.0\.1:", url)]


def shares(model, image):
    """Return the share of each class that occurs, formatted as on the page."""
    network, processor = load_for_inference(str(model), "cpu")
    mask = predict(network, processor, [image])[0].mask
    return {name: f"{(mask == index).float().mean():.2%}" for index, name in NAMES.items() if (mask == index).any()}


def rows_of(models, image):
    """Return the expected table of both models."""
    both = [shares(models / name, image) for name in ("ce", "pals")]
    assert both[0] != both[1]
    return [[name, *(found.get(name, "0.00%") for found in both)] for name in {**both[0], **both[1]}]


@pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromium-driver")
def test_a_picture_is_segmented_by_two_models_side_by_side(models, tmp_path):
    image = patches(450, 300)
    image.save(tmp_path / "street.png")
    (tmp_path / "broken.jpg").write_bytes(b"no image at all")
    arguments = ["--models", f"cross-entropy={models / 'ce'}", f"PALS={models / 'pals'}"]
    with serving(tmp_path, *arguments) as address, browsing(tmp_path) as page:
        page.browser.get(address)
        page.upload(tmp_path / "street.png")
        page.wait_for(lambda: [picture.size for picture in page.pictures()] == [image.size])
        page.press("Segment")
        _, *overlays = page.wait_for(lambda: len(shown := page.pictures()) == 5 and shown)[:3]
        expected = rows_of(models, image)
        page.wait_for(lambda: page.table() == expected)
        page.browser.save_screenshot(str(tmp_path / "page.png"))
        for picture, name in zip(overlays, ("ce", "pals"), strict=True):
            network, processor = load_for_inference(str(models / name), "cpu")
            right = overlay(image, predict(network, processor, [image])[0].mask, NAMES)
            assert np.array_equal(np.asarray(picture), np.asarray(right))
        page.upload(tmp_path / "broken.jpg")
        page.wait_for(lambda: "broken.jpg is not a readable image: its format is not known" in page.text())
        page.browser.save_screenshot(str(tmp_path / "message.png"))
        page.find("button.gallery-item")[0].click()
        page.wait_for(lambda: page.pictures()[0].size == (128, 96))
        page.press("Segment")
        expected = rows_of(models, page.pictures()[0])
        page.wait_for(lambda: page.table() == expected)
        assert "Traceback" not in page.text() + (tmp_path / "log").read_text()
        assert page.foreign_requests() == []


@contextmanager
def launched(blocks):
    """Serve in this process, which avoids slow imports, and yield the address."""
    _, address, _ = blocks.launch(prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    try:
        yield address
    finally:
        blocks.close()


def test_without_models_the_page_says_how_to_give_some(monkeypatch):
    monkeypatch.delenv("PALS_MODELS", raising=False)
    space = runpy.run_path(str(APP))["demo"]  # as `gradio examples/app.py` finds it
    assert not space.is_running  # importing the file starts nothing
    with launched(space) as address:
        page = urllib.request.urlopen(f"{address}config").read().decode()
    assert "PALS_MODELS" in page
    assert "pals-hf demo --models" in page
    assert not space.analytics_enabled


def test_one_model_alone_and_messages(models, tmp_path):
    client = pytest.importorskip("gradio_client")
    image = patches(60, 40)
    image.save(tmp_path / "street.png")
    torch.manual_seed(0)
    save_checkpoint(tmp_path / "whole", image_size=None)  # images keep their size
    folders = {"ce": models / "ce", "gone": tmp_path / "gone", "whole": tmp_path / "whole"}
    with launched(demo_page.build_demo({name: str(folder) for name, folder in folders.items()})) as address:
        page = client.Client(address, verbose=False, analytics_enabled=False)
        file = client.handle_file(str(tmp_path / "street.png"))
        *_, table, _, _, _ = page.predict(file, "ce", demo_page.NONE, api_name="/show")
        assert table["value"]["headers"] == ["class", "ce"]
        assert dict(table["value"]["data"]) == shares(models / "ce", image)
        patches(6, 4).save(tmp_path / "tiny.png")
        for given, name, message in (
            (None, "ce", "Choose an image first"),
            (file, "gone", "cannot load the model"),
            (client.handle_file(str(tmp_path / "tiny.png")), "whole", "greater than actual input size"),
        ):
            with pytest.raises(Exception, match=message):
                page.predict(given, name, demo_page.NONE, api_name="/show")


def test_a_turned_image_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    patches(60, 40).save(tmp_path / "turned.jpg", exif=exif)
    image, nothing = demo_page.read_upload(str(tmp_path / "turned.jpg"))
    assert (image.size, nothing) == ((40, 60), None)


def test_large_images_are_shrunk_and_larger_ones_refused(models, tmp_path):
    client = pytest.importorskip("gradio_client")
    sizes = {"large": (3000, 2000), "strip": (4_000_000, 1), "bomb": (20000, 9000), "larger": (8000, 8000)}
    for name, size in sizes.items():
        Image.new("1", size).save(tmp_path / f"{name}.png")
    large, _ = demo_page.read_upload(str(tmp_path / "large.png"))
    assert 0.99 * demo_page.SHRUNK_TO < large.width * large.height <= demo_page.SHRUNK_TO
    assert large.width / large.height == pytest.approx(1.5, rel=0.01)
    assert demo_page.read_upload(str(tmp_path / "strip.png"))[0].size == (4000, 1)
    assert demo_page.read_upload(str(tmp_path / "bomb.png")) == (None, None)
    blocks = demo_page.build_demo({"ce": str(models / "ce")})
    with launched(blocks) as address:
        config = urllib.request.urlopen(f"{address}config").read().decode()
        assert "more than 2 megapixels, or a side of more than 4000 pixels, are shrunk" in config
        assert "more than 50 megapixels are refused" in config
        page = client.Client(address, verbose=False, analytics_enabled=False)

        def show(name):
            file = client.handle_file(str(tmp_path / f"{name}.png"))
            return page.predict(file, "ce", demo_page.NONE, api_name="/show")

        shown = show("large")[2]["value"]
        assert Image.open(shown["path"] if isinstance(shown, dict) else shown).height == large.height
        with pytest.raises(Exception, match=r"larger\.png .* 8000x8000 pixels, but at most 50 megapixels"):
            show("larger")
        with pytest.raises(client.exceptions.AppError):
            show("bomb")
        assert blocks.upload_file_set
    assert not any(Path(file).exists() for file in blocks.upload_file_set)


def test_the_end_of_the_server_deletes_the_uploads(models, tmp_path):
    client = pytest.importorskip("gradio_client")
    patches(60, 40).save(tmp_path / "street.png")
    with serving(tmp_path, "--models", f"ce={models / 'ce'}") as address:
        page = client.Client(address, verbose=False, analytics_enabled=False)
        page.predict(client.handle_file(str(tmp_path / "street.png")), "ce", demo_page.NONE, api_name="/show")
        assert any(path.name == "street.png" for path in (tmp_path / "gradio").rglob("*"))
    assert not any(path.name == "street.png" for path in (tmp_path / "gradio").rglob("*"))


def test_models_are_named_or_their_own_name(monkeypatch):
    given = ["PALS=me/pals", " runs/ce ", "", "a b=/x=y"]
    expected = {"PALS": "me/pals", "runs/ce": "runs/ce", "a b": "/x=y"}
    assert demo.read_models(given) == expected
    monkeypatch.setenv("PALS_MODELS", ",".join(given))
    assert demo.models_of_environment() == expected


def test_a_missing_model_is_reported_before_the_page_opens(tmp_path):
    result = call(demo.main, "--models", f"mine={tmp_path / 'nowhere'}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: cannot load the model")
    assert result.stderr.count("\n") == 1


def test_without_gradio_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "pals_hf.cli.page")
    result = call(demo.main, "--models", "PALS=runs/pals")
    assert result.returncode == 2
    assert result.stderr == "error: the demo needs gradio. Install it with: pip install 'pals_hf[demo]'\n"


def test_a_deep_upload_is_scaled_as_the_models_do(tmp_path):
    known = Scaling("uint16", 3, (100.0,), (900.0,))
    values, _ = values_of("uint16", 1, 0)
    Image.fromarray(values[..., 0]).save(tmp_path / "deep.tif")
    expected = np.asarray(known.apply(values))
    image, _ = demo_page.read_upload(str(tmp_path / "deep.tif"), known)
    assert np.array_equal(np.asarray(image), expected)
    image.save(tmp_path / "shown.png")  # the page keeps what it shows, and gives it to the models
    assert np.array_equal(np.asarray(demo_page.read_image(str(tmp_path / "shown.png"), known)), expected)
    assert demo_page.read_upload(str(tmp_path / "deep.tif")) == (None, None)


def test_the_models_must_see_one_picture():
    deep, usual, stack = (
        build_image_processor(None, scaling=scaling)
        for scaling in (Scaling("uint16", 3, (1.0,), (9.0,)), None, Scaling("uint8", 4, (0.0,) * 4, (255.0,) * 4))
    )
    assert demo.scaling_of_all({"a": deep, "b": deep}) == Scaling.of(deep)
    assert demo.scaling_of_all({"a": usual}) is None
    assert demo.scaling_of_all({}) is None
    with pytest.raises(InputError, match="b and a were trained on images of different depths or scalings"):
        demo.scaling_of_all({"a": deep, "b": usual})
    with pytest.raises(InputError, match="a takes 4 channels, but the demo shows 3"):
        demo.scaling_of_all({"a": stack})
