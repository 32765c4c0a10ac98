"""The demo: its functions, its error messages, and the page in a headless browser."""

import asyncio
import json
import signal
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from conftest import free_port, tiny_blip, tiny_pair
from PIL import Image
from processes import Program
from test_data import picture
from vlp.processing.blip import train_tokenizer

import vlp
from vlp.commands.demo import MAX_BODY, Demo, DemoError, OnlyOwnRequests, embedded_pictures
from vlp.commands.demo import main as demo_main
from vlp.commands.demo_page import DRAWINGS, SCENES, page, write_examples

COLOURS = ["red", "green", "blue", "yellow"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with two small models, pictures and private files."""
    base = tmp_path_factory.mktemp("demo")
    clip, processor = tiny_pair()
    for part in (clip, processor):
        part.save_pretrained(base / "root/model_cards/clip-tiny")
    blip = tiny_blip()
    tokenizer = train_tokenizer(["a red card, a green card, a blue card on yellow paper"], 118, 30)
    blip.save_pretrained(base / "root/runs/blip-tiny")
    images = vlp.VlpBlipImageProcessor(size={"height": 32, "width": 32})
    vlp.VlpBlipForQuestionAnswering(blip.config).save_pretrained(base / "root/runs/vqa-tiny")
    for name in ("blip-tiny", "vqa-tiny"):
        vlp.VlpBlipProcessor(images, tokenizer).save_pretrained(base / "root/runs" / name)
    (base / "pictures/more").mkdir(parents=True)
    for colour in COLOURS:
        (base / f"pictures/{colour}.png").write_bytes(picture(colour))
    (base / "pictures/more/black.png").write_bytes(picture("black"))
    (base / "secret.txt").write_text("private")
    (base / "secret.png").write_bytes(picture("white"))
    return base


@pytest.fixture(scope="module")
def demo(place) -> Demo:
    return Demo(place / "root", place / "pictures", place / "indexes")


CLIP, BLIP, VQA = "model_cards/clip-tiny", "runs/blip-tiny", "runs/vqa-tiny"


def test_every_tab_works(demo, place):
    red = str(place / "pictures/red.png")
    assert demo.models() == [CLIP, BLIP, VQA]
    for model in (CLIP, BLIP):
        shares = demo.classify(model, red, "red card, dog,\nrocket, dog")
        assert list(shares) == ["red card", "dog", "rocket"] and sum(shares.values()) == pytest.approx(1.0)
    progress = []
    assert demo.build(CLIP, ".", lambda *done: progress.append(done)) == "Indexed pictures: 5. Skipped: none."
    assert progress[-1] == (5, 5)
    found = demo.search(CLIP, ".", "", red)
    assert found[0][1].startswith("red.png  1.00") and len(found) == 5
    assert len(demo.search(CLIP, ".", "a red square", None)) == 5
    assert demo.build(CLIP, "more", lambda *done: None).startswith("Indexed pictures: 1.")
    partial = list(demo.caption(BLIP, red))
    predictor = demo.predictor(BLIP, "caption")
    assert partial[-1] == predictor.caption([Image.open(red)], num_beams=1)[0]
    assert len(partial) > 2 and all(len(a) <= len(b) for a, b in zip(partial, partial[1:], strict=False))
    shares, found = demo.compare(BLIP, red, "a red card", "red a card")
    assert list(shares) == list(found) == ["a red card", "red a card"] and sum(shares.values()) == pytest.approx(1.0)
    assert demo.match(BLIP, red, "a red card")[0]["match"] == pytest.approx(found["a red card"], abs=1e-5)
    assert demo.compare(CLIP, red, "a red card", "red a card")[1] is None
    predictor = demo.predictor(VQA, "answer")
    assert demo.answer(VQA, red, "which colour is it?") == predictor.answer(
        [Image.open(red)], ["which colour is it?"], num_beams=1
    )[0]  # fmt: skip
    assert demo.models("answer") == [VQA] and demo.models("match") == [BLIP] and demo.models("embed") == [CLIP, BLIP]
    shares, heat = demo.match(BLIP, red, "a red card")
    assert sum(shares.values()) == pytest.approx(1.0) and heat.size == Image.open(red).size


def test_errors_are_reported(demo, place):
    red = str(place / "pictures/red.png")
    large = place / "large.png"
    Image.new("1", (6000, 6000)).save(large)
    many = place / "many.bmp"
    Image.new("RGB", (2000, 2000)).save(many)
    for call, message in (
        (lambda: demo.classify(CLIP, None, "a, b"), "Choose a picture first"),
        (lambda: demo.classify(CLIP, red, "a"), "Enter 2 to 1000 class names"),
        (lambda: demo.classify(CLIP, str(large), "a, b"), "decompression bomb; at most 25 million pixels"),
        (lambda: demo.classify(CLIP, str(many), "a, b"), "larger than 10 MB"),
        (lambda: demo.classify(CLIP, str(place / "secret.txt"), "a, b"), "cannot be read: not an image"),
        (lambda: demo.classify("runs/none", red, "a, b"), "is not a model folder; choose from model_cards/clip-tiny"),
        (lambda: demo.match(CLIP, red, "a card"), "cannot match: it has no matching head"),
        (lambda: demo.match(BLIP, red, " "), "Enter a text to match with the picture"),
        (lambda: demo.answer(VQA, red, " "), "Enter a question"),
        (lambda: demo.answer(BLIP, red, "what?"), "cannot answer"),
        (lambda: demo.compare(BLIP, red, "a card", " a card"), "Enter two different captions"),
        (lambda: list(demo.caption(CLIP, red)), "cannot caption"),
        (lambda: list(demo.caption(BLIP, red, "x" * 1001)), "1,001 characters"),
        (lambda: demo.search(BLIP, ".", "x", None), "no index of this folder for this model yet"),
        (lambda: demo.build(CLIP, "nowhere", print), "no folder 'nowhere' in pictures"),
    ):
        with pytest.raises(DemoError, match=message):
            call()
    demo.build(CLIP, ".", lambda *done: None)
    with pytest.raises(DemoError, match="Enter a query, or choose a picture"):
        demo.search(CLIP, ".", " ", None)


@pytest.mark.parametrize("name", ["..", "../secret.png", "/etc", "more/../../root"])
def test_files_outside_the_folders_are_not_read(name, demo, place):
    for call in (lambda: demo.build(CLIP, name, print), lambda: demo.search(CLIP, name, "x", None)):
        with pytest.raises(DemoError, match="outside the folder of pictures"):
            call()
    with pytest.raises(DemoError, match="outside the folder of models"):
        demo.classify("../" + name if not name.startswith("/") else name, str(place / "pictures/red.png"), "a, b")


def test_exif_orientation_is_applied(demo, place):
    from vlp.commands.demo import opened

    image, path = Image.new("RGB", (30, 20), "red"), place / "turned.jpg"
    facts = image.getexif()
    facts[274] = 6
    image.save(path, exif=facts)
    assert opened(str(path)).size == (20, 30)


def test_embedded_pictures_are_written_to_files(tmp_path):
    folder = embedded_pictures(tmp_path)
    assert len(list(folder.glob("*.webp"))) == 1906 and "CC BY" in (folder / "LICENCE.txt").read_text()
    assert Image.open(folder / "red apple.webp").size == (64, 64)


def test_examples_are_written_as_files(tmp_path):
    examples = write_examples(tmp_path)
    assert list(examples.drawings) == list(DRAWINGS)
    assert len(examples.questions) == len(examples.captions) == SCENES
    assert all(question.endswith("?") for _, question in examples.questions)
    assert all(sorted(true.split()) == sorted(false.split()) for _, true, false in examples.captions)
    paths = [*examples.drawings.values(), *(row[0] for row in [*examples.questions, *examples.captions])]
    for path in paths:
        Image.open(path).load()
    assert len(set(paths)) == len(list(tmp_path.iterdir()))


@pytest.fixture(scope="module")
def address(demo, tmp_path_factory):
    """The address of the page, served as by `vlp demo`."""
    pytest.importorskip("gradio")
    blocks = page(demo, write_examples(tmp_path_factory.mktemp("examples"))).queue(default_concurrency_limit=1)
    _, url, _ = blocks.launch(server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, quiet=True,
                              max_file_size=10_000_000, ssr_mode=False)  # fmt: skip
    yield url.rstrip("/")
    blocks.close()


def test_files_are_not_served(address, place):
    """Neither other files nor the pictures themselves can be fetched by their paths."""
    for path in (place / "secret.txt", place / "pictures/red.png", "/etc/passwd"):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{address}/gradio_api/file={path}")
        assert error.value.code in (403, 404)


def test_paths_that_were_not_uploaded_are_rejected(address, place):
    """An upload is classified; a request that names a local file as its upload is rejected."""

    def upload(content: bytes) -> str:
        body = b"--x\r\nContent-Disposition: form-data; name=files; filename=r.png\r\n\r\n" + content + b"\r\n--x--"
        request = urllib.request.Request(f"{address}/gradio_api/upload", body,
                                         {"Content-Type": "multipart/form-data; boundary=x"})  # fmt: skip
        return json.loads(urllib.request.urlopen(request).read())[0]

    def classify(path: str) -> str:
        data = [CLIP, {"path": path, "meta": {"_type": "gradio.FileData"}}, "red card, dog"]
        call = urllib.request.Request(f"{address}/gradio_api/call/classify", json.dumps({"data": data}).encode(),
                                      {"Content-Type": "application/json"})  # fmt: skip
        event = json.loads(urllib.request.urlopen(call).read())["event_id"]
        return urllib.request.urlopen(f"{address}/gradio_api/call/classify/{event}").read().decode()

    assert "event: complete" in classify(upload(picture("red")))
    for content, cause in ((b"no picture", "not an image"), (b"\0\0\0\x18ftypheic" + bytes(90), "HEIC, which Pillow")):
        assert f"The picture cannot be read: {cause}" in classify(upload(content))
    refused = classify(str(place / "secret.png"))
    assert "event: error" in refused and "complete" not in refused


def test_page_in_a_browser(address, place, window):
    """Each tab is used by clicking, and its result is checked."""
    red = str(place / "pictures/red.png")
    window.goto(address)

    def upload(tab: str) -> None:
        clear(tab)
        window.set_input_files(f"#{tab}-picture input[type=file]", red)
        window.wait_for_selector(f"#{tab}-picture img")

    def clear(tab: str) -> None:
        window.click(f"#{tab}-picture button[aria-label='Remove Image']")
        window.wait_for_selector(f"#{tab}-picture img", state="detached")

    window.wait_for_selector("#classify-picture img")  # a picture to try
    window.fill("#classify-names textarea", "red card, dog")
    clear("classify")
    window.click("#classify-go")
    window.get_by_text("Choose a picture first.").wait_for()
    window.set_input_files("#classify-picture input[type=file]", red)
    window.wait_for_selector("#classify-picture img")
    window.click("#classify-go")
    window.wait_for_selector("#classify-result h2")
    shown = window.inner_text("#classify-result")
    assert "red card" in shown and "dog" in shown and "%" in shown
    window.get_by_role("tab", name="Search").click()
    window.get_by_role("button", name="Folder: pictures").click()
    window.click("#search-build")
    window.wait_for_function("document.querySelector('#search-state textarea').value.startsWith('Indexed pictures: 5')")
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
    assert "match" in window.inner_text("#match-result")
    window.wait_for_selector("#match-heat img")
    window.get_by_role("tab", name="Ask").click()
    window.click("#ask-go")  # the picture and the question to try
    window.wait_for_function("document.querySelector('#ask-result textarea').value.length > 0")
    window.get_by_role("tab", name="Word order").click()
    window.click("#order-go")
    window.wait_for_selector("#order-match h2")
    assert window.inner_text("#order-similarity") and window.errors == []


def test_a_port_in_use_is_refused_and_one_ctrl_c_stops(tmp_path):
    pytest.importorskip("gradio")
    port = str(free_port())
    argv = ["vlp demo", "--port", port, "--pictures", str(tmp_path), "--indexes", str(tmp_path / "indexes")]
    first = Program(tmp_path / "first.txt", demo_main, argv=argv, folder=tmp_path)
    while "press Ctrl-C to stop" not in ((tmp_path / "first.txt").read_text() if first.output.exists() else ""):
        assert first.process.is_alive()
        time.sleep(0.2)
    code, output = Program(tmp_path / "second.txt", demo_main, argv=argv, folder=tmp_path).wait()
    assert code == 1 and f"--port {port}: Address already in use." in output
    first.send_signal(signal.SIGINT)
    code, output = first.wait()
    assert code == 0 and "Traceback" not in output


# --- requests of others -----------------------------------------------------------------------------------------------


def answer_of(own: str = "127.0.0.1", path: str = "/", body: bytes = b"", **headers: str) -> tuple[int, int]:
    """The status of a request to the middleware, and the number of body bytes that reach the application."""
    received = []

    async def app(scope, receive, send):
        more = True
        while more:
            message = await receive()
            received.append(message.get("body", b""))
            more = message.get("more_body", False)
        await send({"type": "http.response.start", "status": 200, "headers": []})

    messages, sent = [{"type": "http.request", "body": body[i : i + 100_000], "more_body": True}
                      for i in range(0, len(body), 100_000)] + [{"type": "http.request", "body": b""}], []  # fmt: skip

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    named = [(name.replace("_", "-").encode(), value.encode("latin1")) for name, value in headers.items()]
    asyncio.run(OnlyOwnRequests(app, own)({"type": "http", "path": path, "headers": named}, receive, send))
    return sent[0]["status"], sum(map(len, received))


@pytest.mark.parametrize(
    ("host", "headers", "status"),
    [
        ("127.0.0.1", dict(host="127.0.0.1:7860"), 200),
        ("127.0.0.1", dict(host="localhost:7860", origin="http://localhost:7860"), 200),
        ("127.0.0.1", dict(host="[::1]:7860"), 200),
        ("127.0.0.1", dict(host="evil.example:7860"), 403),
        ("127.0.0.1", dict(host="127.0.0.1.evil.example"), 403),
        ("127.0.0.1", dict(host="evil.example:7860", origin="http://evil.example:7860"), 403),
        ("127.0.0.1", dict(host="127.0.0.1:7860", origin="http://evil.example"), 403),
        ("127.0.0.1", dict(host="127.0.0.1:7860", origin="null"), 403),
        ("127.0.0.1", dict(host="127.0.0.1:7860", sec_fetch_site="cross-site", sec_fetch_mode="cors"), 403),
        ("127.0.0.1", dict(host="127.0.0.1:7860", sec_fetch_site="cross-site", sec_fetch_mode="navigate"), 200),
        ("127.0.0.1", {}, 403),
        ("0.0.0.0", dict(host="192.168.1.7:7860"), 200),
        ("0.0.0.0", dict(host="evil.example"), 403),
        ("127.0.0.1", dict(host="127.0.0.1", content_length="-1"), 403),
        ("127.0.0.1", dict(host="127.0.0.1", content_length=str(10**12)), 413),
    ],
)
def test_requests_of_other_sites_are_refused(host, headers, status):
    assert answer_of(host, **headers)[0] == status


def test_bodies_without_a_length_are_bounded():
    _, received = answer_of(body=b"x" * 30_000_000, host="127.0.0.1", path="/gradio_api/call/classify")
    assert received <= MAX_BODY
    assert answer_of(body=b"x" * 100_000, host="127.0.0.1") == (200, 100_000)


def test_index_of_another_model_of_the_same_name_is_reported(demo, place, monkeypatch):
    demo.build(CLIP, ".", lambda *done: None)
    monkeypatch.setattr(
        type(demo.predictor(CLIP, "embed")), "embed_texts", lambda self, texts: torch.ones(len(texts), 3)
    )
    with pytest.raises(DemoError, match="built with another model of this name: build it again"):
        demo.search(CLIP, ".", "a red square", None)
