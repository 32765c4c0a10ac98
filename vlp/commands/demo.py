"""`vlp-demo` (`make demo`): a page to classify, search, caption and match pictures with models of vlp or transformers.

It listens on this machine alone (127.0.0.1). Models are read from the folder that it is started in, pictures to search
from the one that --pictures names, and nothing else; uploads are bounded in bytes and in pixels.
"""

import argparse
import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from datasets.utils.py_utils import iter_batched
from PIL import Image
from transformers import TextIteratorStreamer

from ..errors import UnsupportedModelError
from ..inference import BlipPredictor, Predictor, load
from ..model_cards.plots import overlay
from ..modeling_vlp.heatmaps import matching_maps
from ..processing.pictures import PictureError, read_picture, to_rgb
from ..training.data.rows import describe
from ..training.data.sources import load_rows
from .index import Index, NoIndexError, build

MAX_BYTES, MAX_PIXELS = 10_000_000, 25_000_000  # of an upload
MAX_NAMES, MAX_WORDS = 1000, 1000  # names to classify by; letters of a query or a text
FOUND = 12  # pictures that a search shows


class DemoError(ValueError):
    """What the page shows where something cannot be done."""


class Demo:
    """What the page can do, apart from how it looks.

    Args:
        root: models are read from folders in it alone. pictures: searches look through folders in it alone.
        place: where indexes are kept.
    """

    def __init__(self, root: Path, pictures: Path, place: Path):
        self.root, self.pictures, self.place = root.resolve(), pictures.resolve(), place
        self.load = lru_cache(maxsize=4)(load)

    def models(self) -> list[str]:
        """Folders with a model, shipped or trained."""
        found = [path.parent for name in ("model_cards", "runs") for path in self.root.glob(f"{name}/*/config.json")]
        return [path.relative_to(self.root).as_posix() for path in sorted(found)]

    def predictor(self, name: str, use: str) -> Predictor:
        folder = inside(self.root, name, "models")
        if not (folder / "config.json").is_file():
            raise DemoError(f"{name} is no folder of a model; there are {', '.join(self.models()) or 'none'}.")
        try:
            return self.load(str(folder), use)
        except UnsupportedModelError as error:
            raise DemoError(str(error).replace(f"{self.root}/", "")) from error

    def classify(self, model: str, picture: str | None, names: str) -> dict[str, float]:
        """The probability of each of the names, which commas or lines part."""
        listed = list(dict.fromkeys(name.strip() for name in names.replace("\n", ",").split(",") if name.strip()))
        if not 1 < len(listed) <= MAX_NAMES:
            raise DemoError(f"Give from 2 to {MAX_NAMES} names, parted by commas; there are {len(listed)}.")
        predictor = self.predictor(model, "embed")
        image, texts = (
            predictor.embed_images([opened(picture)]),
            [predictor.embed_texts(c) for c in iter_batched(listed, 64)],
        )
        shares = (predictor.similarity(image, torch.cat(texts)) / predictor.temperature).softmax(dim=1)[0]
        return dict(zip(listed, shares.tolist(), strict=True))

    def index(self, model: str, folder: str) -> Path:
        """Where the index of a folder by a model is kept."""
        key = f"{inside(self.root, model, 'models')} {inside(self.pictures, folder, 'pictures')}"
        return self.place / hashlib.sha256(key.encode()).hexdigest()[:16]

    def build(self, model: str, folder: str, progress) -> str:
        """Index a folder of pictures, or what is new in it; tells how it went."""
        path = inside(self.pictures, folder, "pictures")
        if not path.is_dir():
            raise DemoError(f"There is no folder {folder!r} in {self.pictures.name}.")
        try:
            name = str(inside(self.root, model, "models"))
            skipped = build(
                path, self.index(model, folder), name, predictor=self.predictor(model, "embed"), progress=progress
            )
        except NoIndexError as error:
            raise DemoError(str(error).replace(f"{self.pictures}/", "")) from error
        return f"{len(Index(self.index(model, folder))):,} pictures; could not be read: {describe(skipped)}."

    def search(self, model: str, folder: str, words: str, picture: str | None) -> list[tuple[Image.Image, str]]:
        """Pictures and their names, found by words or, where there are none, by a picture."""
        try:
            index = Index(self.index(model, folder))
        except NoIndexError:
            raise DemoError("There is no index of this folder by this model yet: build it first.") from None
        predictor = self.predictor(model, "embed")
        if words.strip():
            query = predictor.embed_texts([bounded(words)])[0]
        elif picture:
            query = predictor.embed_images([opened(picture)])[0]
        else:
            raise DemoError("Say what to look for, in words or by a picture.")
        shown = []
        for hit in index.search(query, FOUND):
            try:
                path = inside(self.pictures, str(inside(self.pictures, folder, "pictures") / hit.path), "pictures")
                image = to_rgb(read_picture(path, MAX_PIXELS))
            except PictureError:
                continue  # it was there when the index was built
            image.thumbnail((256, 256))
            shown.append((image, f"{hit.path}  {hit.score:.2f}"))
        return shown

    def caption(self, model: str, picture: str | None, prompt: str = "") -> Iterator[str]:
        """A caption as it grows, word by word."""
        predictor, image = self.predictor(model, "caption"), opened(picture)
        streamer = TextIteratorStreamer(predictor.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        done: list[str | Exception] = []

        def generate() -> None:
            try:
                done.append(predictor.caption([image], bounded(prompt), num_beams=1, streamer=streamer)[0])
            except Exception as error:
                done.append(error)
                streamer.end()

        thread = threading.Thread(target=generate, daemon=True)
        thread.start()
        text = ""
        for part in streamer:
            text += part
            yield text.strip()
        thread.join()
        if isinstance(done[0], Exception):
            raise DemoError(f"{model} could not generate a caption: {done[0]}") from done[0]
        yield done[0]

    def match(self, model: str, picture: str | None, text: str) -> tuple[dict[str, float], Image.Image | None]:
        """How likely a text is the picture's, by a BLIP's or BLIP-2's matching head, and what speaks for it."""
        if not text.strip():
            raise DemoError("Say what the picture is to be matched with.")
        predictor, image = self.predictor(model, "match"), opened(picture)
        logits = predictor.match(predictor.encode_images([image]), torch.zeros(1, dtype=torch.long), [bounded(text)])[0]
        no, yes = logits.softmax(dim=0).tolist()
        heat = None
        if type(predictor) is BlipPredictor:
            grid = matching_maps(
                predictor.model, predictor.processor, predictor.prepare_images([image]), bounded(text)
            ).maps[0]
            heat = overlay(image, grid)
        return {"they match": yes, "they do not": no}, heat


def inside(root: Path, name: str, what: str) -> Path:
    """A path in a folder. Raises DemoError where it is not."""
    path = (root / (name or ".")).resolve()
    if not path.is_relative_to(root):
        raise DemoError(f"{name} is outside of the folder of {what} that this page may read.")
    return path


def opened(picture: str | None) -> Image.Image:
    """An upload, upright. Raises DemoError where it is none, or too large."""
    if not picture:
        raise DemoError("Choose a picture first.")
    if os.path.getsize(picture) > MAX_BYTES:
        raise DemoError(f"The picture has more than {MAX_BYTES // 1_000_000} MB.")
    try:
        return read_picture(picture, MAX_PIXELS)
    except PictureError as error:
        most = f"; at most {MAX_PIXELS // 1_000_000} million pixels" if "bomb" in str(error) else ""
        raise DemoError(f"The picture cannot be read: {error}{most}.") from None


def bounded(text: str) -> str:
    if len(text) > MAX_WORDS:
        raise DemoError(f"The text has {len(text):,} letters; {MAX_WORDS:,} are read at most.")
    return text


def embedded_pictures(place: Path) -> Path:
    """The drawings of the embedded data that training never sees, as files."""
    folder = place / "emoji"
    if not (folder / "LICENCE.txt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for row in load_rows("emoji", "test", "image"):
            (folder / f"{row['caption'].replace('/', '-')}.webp").write_bytes(row["image"]["bytes"])
        (folder / "LICENCE.txt").write_text("Twemoji (emoji-datasource-twitter 16.0.0), CC BY 4.0.\n")
    return folder


def page(demo: Demo):
    """The page, as gradio's Blocks."""
    import gradio as gr

    @contextlib.contextmanager
    def in_words():
        """What is wrong is shown in words."""
        try:
            yield
        except DemoError as error:
            raise gr.Error(str(error), print_exception=False) from error

    def guarded(function):
        def call(*values):
            with in_words():
                return function(*values)

        return call

    def caption(*values):
        with in_words():
            yield from demo.caption(*values)

    def build_index(model, folder, progress=gr.Progress()):  # noqa: B008 (gradio finds it by its default)
        with in_words():
            return demo.build(model, folder, lambda done, total: progress((done, total), unit="pictures"))

    models = demo.models()
    compares = next((m for m in models if "clip" in m), models[0] if models else "")
    writes = next((m for m in models if "blip-" in m), compares)

    def choose(value: str, name: str):
        return gr.Dropdown(models, value=value or None, label="Model", allow_custom_value=True, elem_id=f"{name}-model",
                           info="A folder of a model, where this page was started or below.")  # fmt: skip

    def picture(name: str):
        return gr.Image(type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"], label="Picture",
                        elem_id=f"{name}-picture", height=260)  # fmt: skip

    with gr.Blocks(title="vlp", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("# vlp\nClassify, search, caption and match pictures with your own CLIP and BLIP.")
        with gr.Tab("Classify", id="classify"), gr.Row():
            with gr.Column():
                classify_model, classify_picture = choose(compares, "classify"), picture("classify")
                names = gr.Textbox("red apple, rocket, grinning face, dog", label="Names, parted by commas",
                                   elem_id="classify-names")  # fmt: skip
                classify = gr.Button("Classify", variant="primary", elem_id="classify-go")
            shares = gr.Label(label="What it is", num_top_classes=10, elem_id="classify-result")
        classify.click(guarded(demo.classify), [classify_model, classify_picture, names], shares, api_name="classify")
        with gr.Tab("Search", id="search"), gr.Row():
            with gr.Column():
                search_model = choose(compares, "search")
                folder = gr.Textbox(".", label=f"Folder, in {demo.pictures.name}", elem_id="search-folder")
                index = gr.Button("Build the index, or bring it up to date", elem_id="search-build")
                state = gr.Textbox(label="Index", interactive=False, elem_id="search-state")
                words = gr.Textbox(label="Words", placeholder="a red apple", elem_id="search-words")
                search_picture = picture("search")
                search = gr.Button("Search", variant="primary", elem_id="search-go")
            found = gr.Gallery(label="Found", columns=4, elem_id="search-result")
        index.click(build_index, [search_model, folder], state, api_name="index")
        for event in (search.click, words.submit):
            event(guarded(demo.search), [search_model, folder, words, search_picture], found, api_name="search")
        with gr.Tab("Caption", id="caption"), gr.Row():
            with gr.Column():
                caption_model, caption_picture = choose(writes, "caption"), picture("caption")
                prompt = gr.Textbox(label="Begin with", elem_id="caption-prompt")
                write = gr.Button("Caption", variant="primary", elem_id="caption-go")
            written = gr.Textbox(label="Caption", elem_id="caption-result", interactive=False)
        write.click(caption, [caption_model, caption_picture, prompt], written, api_name="caption")
        with gr.Tab("Match", id="match"), gr.Row():
            with gr.Column():
                match_model, match_picture = choose(writes, "match"), picture("match")
                text = gr.Textbox(label="Text", placeholder="red apple", elem_id="match-text")
                match = gr.Button("Match", variant="primary", elem_id="match-go")
            with gr.Column():
                told = gr.Label(label="Do they match?", elem_id="match-result")
                heat = gr.Image(label="What speaks for it", interactive=False, elem_id="match-heat", height=260,
                                buttons=["download", "fullscreen"])  # fmt: skip
        match.click(guarded(demo.match), [match_model, match_picture, text], [told, heat], api_name="match")
    return blocks


def main() -> None:
    parser = argparse.ArgumentParser(prog="vlp-demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument(
        "--pictures", type=Path, help="folder of pictures to search; the embedded drawings if not given"
    )
    parser.add_argument("--indexes", type=Path, default=Path("runs/demo"), help="where indexes are kept")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port (default: 7860)")
    options = parser.parse_args()
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ModuleNotFoundError:
        sys.exit('error: the demo needs gradio: pip install "vlp[demo]".')
    if options.pictures and not options.pictures.is_dir():
        sys.exit(f"error: --pictures {options.pictures}: there is no such folder.")
    pictures = options.pictures or embedded_pictures(options.indexes)
    demo = Demo(Path.cwd(), pictures, options.indexes / "indexes")
    if not demo.models():
        print("There is no model in model_cards/ or runs/: `make train` makes one.")
    print(f"The page is on http://{options.host}:{options.port} (Ctrl-C ends it).", flush=True)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # none from elsewhere
    try:
        page(demo).queue(default_concurrency_limit=1, max_size=32).launch(
            server_name=options.host, server_port=options.port, share=False, max_file_size=MAX_BYTES, theme=theme,
            footer_links=[], ssr_mode=False, quiet=True,
        )  # fmt: skip
    except OSError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
