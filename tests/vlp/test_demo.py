"""The demo: what it does, what it refuses, and the page in a headless browser. Run: pytest tests/test_demo.py"""

import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from conftest import free_port, tiny_blip, tiny_pair
from PIL import Image
from test_data import picture
from vlp.processing.blip import train_tokenizer

import vlp
from vlp.commands.demo import Demo, DemoError, embedded_pictures, page

COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two small models, pictures, and a file that is nobody's business."""
    base = tmp_path_factory.mktemp("demo")
    clip, processor = tiny_pair()
    for part in (clip, processor):
        part.save_pretrained(base / "root/model_cards/clip-tiny")
    blip = tiny_blip()
    tokenizer = train_tokenizer(["a red card, a green card, a blue card on yellow paper"], 118, 30)
    blip.save_pretrained(base / "root/runs/blip-tiny")
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    vlp.VlpBlipProcessor(images, tokenizer).save_pretrained(base / "root/runs/blip-tiny")
    (base / "pictures/more").mkdir(parents=True)
    for colour in COLOURS:
        (base / f"pictures/{colour}.png").write_bytes(picture(colour))
    (base / "pictures/more/black.png").write_bytes(picture("black"))
    (base / "secret.txt").write_text("nobody's business")
    (base / "secret.png").write_bytes(picture("white"))
    return base


@pytest.fixture(scope="module")
def demo(place) -> Demo:
    return Demo(place / "root", place / "pictures", place / "indexes")


CLIP, BLIP = "model_cards/clip-tiny", "runs/blip-tiny"


def test_every_tab_does_its_work(demo, place):
    red = str(place / "pictures/red.png")
    assert demo.models() == [CLIP, BLIP]
    for model in (CLIP, BLIP):
        shares = demo.classify(model, red, "red card, dog,\nrocket, dog")
        assert list(shares) == ["red card", "dog", "rocket"] and sum(shares.values()) == pytest.approx(1.0)
    told = []
    assert demo.build(CLIP, ".", lambda *done: told.append(done)) == "5 pictures; could not be read: none."
    assert told[-1] == (5, 5)
    found = demo.search(CLIP, ".", "", red)
    assert found[0][1].startswith("red.png  1.00") and len(found) == 5
    assert len(demo.search(CLIP, ".", "a red square", None)) == 5
    assert demo.build(CLIP, "more", lambda *done: None).startswith("1 pictures")
    grown = list(demo.caption(BLIP, red))
    predictor = demo.predictor(BLIP, "caption")
    assert grown[-1] == predictor.caption([Image.open(red)], num_beams=1)[0]
    assert len(grown) > 2 and all(len(a) <= len(b) for a, b in zip(grown, grown[1:], strict=False))
    shares, heat = demo.match(BLIP, red, "a red card")
    assert sum(shares.values()) == pytest.approx(1.0) and heat.size == Image.open(red).size


def test_what_cannot_be_is_told(demo, place):
    red = str(place / "pictures/red.png")
    large = place / "large.png"
    Image.new("1", (6000, 6000)).save(large)
    many = place / "many.bmp"
    Image.new("RGB", (2000, 2000)).save(many)
    for call, message in (
        (lambda: demo.classify(CLIP, None, "a, b"), "Choose a picture first"),
        (lambda: demo.classify(CLIP, red, "a"), "Give from 2 to 1000 names"),
        (lambda: demo.classify(CLIP, str(large), "a, b"), "decompression bomb; at most 25 million pixels"),
        (lambda: demo.classify(CLIP, str(many), "a, b"), "more than 10 MB"),
        (lambda: demo.classify(CLIP, str(place / "secret.txt"), "a, b"), "cannot be read: not an image"),
        (lambda: demo.classify("runs/none", red, "a, b"), "is no folder of a model; there are model_cards/clip-tiny"),
        (lambda: demo.match(CLIP, red, "a card"), "cannot match: it has no matching head"),
        (lambda: demo.match(BLIP, red, " "), "Say what the picture is to be matched with"),
        (lambda: list(demo.caption(CLIP, red)), "cannot caption"),
        (lambda: list(demo.caption(BLIP, red, "x" * 1001)), "1,001 letters"),
        (lambda: demo.search(BLIP, ".", "x", None), "no index of this folder by this model yet"),
        (lambda: demo.build(CLIP, "nowhere", print), "no folder 'nowhere' in pictures"),
    ):
        with pytest.raises(DemoError, match=message):
            call()
    demo.build(CLIP, ".", lambda *done: None)
    with pytest.raises(DemoError, match="Say what to look for"):
        demo.search(CLIP, ".", " ", None)


@pytest.mark.parametrize("name", ["..", "../secret.png", "/etc", "more/../../root"])
def test_nothing_outside_of_the_folders_is_read(name, demo, place):
    for call in (lambda: demo.build(CLIP, name, print), lambda: demo.search(CLIP, name, "x", None)):
        with pytest.raises(DemoError, match="outside of the folder of pictures"):
            call()
    with pytest.raises(DemoError, match="outside of the folder of models"):
        demo.classify("../" + name if not name.startswith("/") else name, str(place / "pictures/red.png"), "a, b")


def test_a_picture_on_its_side_is_put_upright(demo, place):
    from vlp.commands.demo import opened

    image, path = Image.new("RGB", (30, 20), "red"), place / "turned.jpg"
    facts = image.getexif()
    facts[274] = 6
    image.save(path, exif=facts)
    assert opened(str(path)).size == (20, 30)


def test_the_embedded_drawings_become_files(tmp_path):
    folder = embedded_pictures(tmp_path)
    assert len(list(folder.glob("*.webp"))) == 1906 and "CC BY" in (folder / "LICENCE.txt").read_text()
    assert Image.open(folder / "red apple.webp").size == (64, 64)


@pytest.fixture(scope="module")
def address(demo):
    """The page, served as `vlp-demo` does."""
    pytest.importorskip("gradio")
    blocks = page(demo).queue(default_concurrency_limit=1)
    _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True,
                              max_file_size=10_000_000, ssr_mode=False)  # fmt: skip
    yield url.rstrip("/")
    blocks.close()


def test_files_are_not_served(address, place):
    """Neither what lies beside the folder nor the pictures themselves can be fetched by their paths."""
    for path in (place / "secret.txt", place / "pictures/red.png", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert told.value.code in (403, 404)


def test_a_path_that_was_not_uploaded_is_no_picture(address, place):
    """An upload is classified; a call that names a file of this machine as its upload is refused."""
    body = b"--x\r\nContent-Disposition: form-data; name=files; filename=r.png\r\n\r\n" + picture("red") + b"\r\n--x--"
    upload = urllib.request.Request(f"{address}/gradio_api/upload", body,
                                    {"Content-Type": "multipart/form-data; boundary=x"})  # fmt: skip
    uploaded = json.loads(urllib.request.urlopen(upload).read())[0]

    def classify(path: str) -> str:
        data = [CLIP, {"path": path, "meta": {"_type": "gradio.FileData"}}, "red card, dog"]
        call = urllib.request.Request(f"{address}/gradio_api/call/classify", json.dumps({"data": data}).encode(),
                                      {"Content-Type": "application/json"})  # fmt: skip
        event = json.loads(urllib.request.urlopen(call).read())["event_id"]
        return urllib.request.urlopen(f"{address}/gradio_api/call/classify/{event}").read().decode()

    assert "event: complete" in classify(uploaded)
    refused = classify(str(place / "secret.png"))
    assert "event: error" in refused and "complete" not in refused


def test_the_page_in_a_browser(address, place):
    """Each tab, by clicks, read back."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    red = str(place / "pictures/red.png")
    with sync_api.sync_playwright() as tool:
        chromium = tool.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        window = chromium.new_page()
        window.set_default_timeout(60_000)
        errors = []
        window.on("pageerror", lambda error: errors.append(str(error)))
        window.goto(address)

        def upload(tab: str) -> None:
            window.set_input_files(f"#{tab}-picture input[type=file]", red)
            window.wait_for_selector(f"#{tab}-picture img")

        window.wait_for_selector("#classify-go")
        window.fill("#classify-names textarea", "red card, dog")
        window.click("#classify-go")
        window.get_by_text("Choose a picture first.").wait_for()
        upload("classify")
        window.click("#classify-go")
        window.wait_for_selector("#classify-result h2")
        told = window.inner_text("#classify-result")
        assert "red card" in told and "dog" in told and "%" in told
        window.get_by_role("tab", name="Search").click()
        window.click("#search-build")
        window.wait_for_function("document.querySelector('#search-state textarea').value.startsWith('5 pictures')")
        window.fill("#search-words textarea", "a red square")
        window.click("#search-go")
        window.wait_for_selector("#search-result img")
        assert window.locator("#search-result img").count() >= 5
        window.get_by_role("tab", name="Caption").click()
        upload("caption")
        window.click("#caption-go")
        window.wait_for_function("document.querySelector('#caption-result textarea').value.length > 0")
        window.get_by_role("tab", name="Match").click()
        upload("match")
        window.fill("#match-text textarea", "a red card")
        window.click("#match-go")
        window.wait_for_selector("#match-result h2")
        assert "they match" in window.inner_text("#match-result")
        window.wait_for_selector("#match-heat img")
        assert errors == []
        chromium.close()
