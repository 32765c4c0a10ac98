"""Exported models run in transformers.js, in Node and in a browser, as they run here."""

import functools
import http.server
import json
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

import vlp
from vlp.commands import onnx

ROOT = Path(__file__).parents[2]
MODULES = ROOT / "build/browser/node_modules"  # which `make test` installs
PICTURE = ROOT / "docs/red-apple.webp"
NAMES = ["red apple", "dog", "rocket"]
PACKAGE = "https://cdn.jsdelivr.net/npm/"

pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.skipif(not MODULES.is_dir(), reason="transformers.js is not installed (make test does)")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A folder of exported models; the weights of one are beside its files, as those of a large model are."""
    folder = tmp_path_factory.mktemp("exported")
    for name, model, words in (
        ("clip", "clip-emoji", []),
        ("blip", "blip-emoji", ["--architecture", "VlpBlipForImageTextRetrieval"]),
        ("captioner", "blip-emoji", ["--architecture", "VlpBlipForConditionalGeneration"]),
    ):
        command = ["vlp onnx", str(ROOT / "model_cards" / model), str(folder / name), *words]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(onnx, "MOST_BYTES", 1e6 if name == "blip" else onnx.MOST_BYTES)
            patch.setattr("sys.argv", command)
            onnx.main()
        assert (folder / name / "onnx/model.onnx_data").is_file() == (name == "blip")
    return folder


def values_of(tensor: torch.Tensor) -> dict:
    return {"values": tensor.flatten().tolist(), "shape": list(tensor.shape)}


@torch.no_grad()
def test_node_gives_what_python_gives(exported, tmp_path):
    """The same scores and captions from the same pixels; from the file, but for how a picture is made smaller."""
    picture = Image.open(PICTURE)
    clip = vlp.VlpClipModel.from_pretrained(ROOT / "model_cards/clip-emoji").eval()
    processor = vlp.VlpClipProcessor.from_pretrained(ROOT / "model_cards/clip-emoji")
    inputs = processor(images=picture, text=NAMES, return_tensors="pt", padding=True)
    blip = ROOT / "model_cards/blip-emoji"
    captioner = vlp.VlpBlipForConditionalGeneration.from_pretrained(blip).eval()
    pixels = vlp.VlpBlipProcessor.from_pretrained(blip)(images=picture, return_tensors="pt")["pixel_values"]
    given = {"ids": inputs["input_ids"], "pixels": inputs["pixel_values"], "blip_pixels": pixels}
    (exported / "inputs.json").write_text(json.dumps({name: values_of(each) for name, each in given.items()}))
    script = tmp_path / "run.mjs"  # beside the modules, as Node looks for them
    script.write_text((ROOT / "tests/browser/run.mjs").read_text())
    (tmp_path / "node_modules").symlink_to(MODULES)
    command = ["node", str(script), str(exported), str(PICTURE)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    expected = clip(input_ids=inputs["input_ids"], pixel_values=inputs["pixel_values"]).logits_per_image
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-4, atol=1e-4)
    assert found["tokens"] == captioner.generate(pixel_values=pixels, num_beams=1, max_new_tokens=8).tolist()
    assert found["caption"] == "red apple"
    for name in ("clip fp32", "clip q8", "blip fp32", "blip q8"):
        best = max(found[name], key=lambda each: each["score"])
        assert best["label"] == "red apple" and best["score"] > 0.99, found[name]
        assert {each["label"] for each in found[name]} == set(NAMES)


def test_snippets_of_the_page_run(exported, tmp_path):
    """The JavaScript of docs/browser.md, with the files that it names."""
    text = (ROOT / "docs/browser.md").read_text()
    snippets = re.findall(r"```js\n(.*?)```", text, re.DOTALL)
    assert snippets
    place = tmp_path / "browser"
    place.mkdir()
    for target, source in (("node_modules", MODULES), ("model", exported / "clip"), ("../red-apple.webp", PICTURE)):
        (place / target).symlink_to(source)
    for number, snippet in enumerate(snippets):
        script = place / f"{number}.mjs"
        script.write_text(snippet)
        ran = subprocess.run(["node", script.name], capture_output=True, text=True, timeout=200, cwd=place)
        assert ran.returncode == 0 and "red apple" in ran.stdout, ran.stderr


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass


def from_modules(route) -> None:
    """Answer a request for a package of the network from the installed one."""
    owner, _, rest = route.request.url.removeprefix(PACKAGE).partition("/")
    if owner.startswith("@"):
        second, _, rest = rest.partition("/")
        owner = f"{owner}/{second}"
    package = MODULES / (owner[0] + owner[1:].partition("@")[0])
    path = package / (rest or json.loads((package / "package.json").read_text())["jsdelivr"])
    kind = "application/wasm" if path.suffix == ".wasm" else "text/javascript"
    route.fulfill(path=str(path), headers={"access-control-allow-origin": "*", "content-type": kind})


def test_page_in_a_browser(exported, tmp_path, window):
    """docs/browser: the page classifies a picture and searches by words, with files alone."""
    for name in ("index.html", "drawings.webp"):
        shutil.copy(ROOT / "docs/browser" / name, tmp_path)
    os.symlink(exported / "clip", tmp_path / "model")
    red = tmp_path / "red.png"
    Image.new("RGB", (80, 60), "red").save(red)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    window.set_default_timeout(90_000)
    window.route(f"{PACKAGE}**", from_modules)
    window.goto(f"http://127.0.0.1:{server.server_port}/")
    window.get_by_text("Ready.").wait_for()
    window.click("#classify")
    window.get_by_text("Classified in").wait_for()
    assert window.locator(".bar span").first.inner_text() == "red apple"
    assert float(window.locator(".bar b").first.inner_text().removesuffix(" %")) > 90
    window.fill("#names", " , ")
    window.click("#classify")
    window.get_by_text("Type some names first.").wait_for()
    window.fill("#words", "red apple")
    window.press("#words", "Enter")
    window.get_by_text("Searched 144 pictures").wait_for()
    first = window.locator("#found img").first.get_attribute("src")
    assert first == window.locator("#picture").get_attribute("src")  # the apple
    window.set_input_files("#files", [str(red), str(PICTURE)])
    window.get_by_text("2 pictures can be searched.").wait_for()
    window.click("#search")
    window.get_by_text("Searched 2 pictures").wait_for()
    assert window.locator("#found img").count() == 2
    assert window.errors == []
    window.set_input_files("#file", str(tmp_path / "index.html"))
    window.fill("#names", "red apple")
    window.click("#classify")
    window.get_by_text("is not a picture that the browser can read").wait_for()
    server.shutdown()
