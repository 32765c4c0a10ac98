"""`vlp demo` (`make demo`): a web page to classify, search, caption, match and ask about pictures.

It uses models of vlp or transformers. By default, the server listens only on this machine (127.0.0.1). It reads
models only from the folder in which it is started, and pictures to search only from the folder given by --pictures.
Uploads are limited in bytes and in pixels.
"""

import argparse
import hashlib
import ipaddress
import os
import re
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from datasets.utils.py_utils import iter_batched
from PIL import Image
from transformers import TextIteratorStreamer

from ..errors import ArgumentError, CommandParser, UserError, brief, is_valid, printable, reported_errors
from ..files import kind_of, usable_path
from ..inference import BlipPredictor, Predictor, load
from ..loading import holds_model, read_config, row_of
from ..model_cards.plots import overlay
from ..modeling_vlp.heatmaps import matching_maps
from ..processing.pictures import PictureError, read_picture, to_rgb
from ..training.data.rows import describe
from ..training.data.sources import load_rows
from .index import Index, NoIndexError, build

MAX_BYTES, MAX_PIXELS = 10_000_000, 25_000_000  # limits of an upload
MAX_NAMES, MAX_CHARACTERS = 1000, 1000  # class names; characters of a query or a text
MAX_TOTAL = 20_000  # characters of all class names together
MAX_BODY = 1_000_000  # bytes of a request that is no upload
HEAT = 1024  # longest side of a heat map, in pixels
RESULTS = 12  # pictures that a search shows


class DemoError(UserError, ValueError):
    """A request that the demo cannot serve; the page shows the message."""


class Demo:
    """The functions behind the page, without its layout.

    Args:
        root: models are read only from folders inside it.
        pictures: only folders inside it can be searched.
        place: folder where indexes are stored.
    """

    def __init__(self, root: Path, pictures: Path, place: Path):
        self.root, self.pictures, self.place = root.resolve(), pictures.resolve(), place
        self.load = lru_cache(maxsize=4)(load)

    def models(self, use: str | None = None) -> list[str]:
        """The folders of models, shipped or trained, relative to the root.

        Args:
            use: one of `architectures.USES`, which the models of vlp among them must support; None: any.
        """
        found = [
            path for place in ("model_cards", "runs") for path in self.root.glob(f"{place}/*") if holds_model(path)
        ]
        return [path.relative_to(self.root).as_posix() for path in sorted(found) if use is None or supports(path, use)]

    def predictor(self, name: str, use: str) -> Predictor:
        """Load a model; the last four are cached.

        Args:
            name: the folder of the model, relative to the root.
            use: one of `architectures.USES`.

        Raises:
            DemoError: if there is no such model, or it does not support the use.
        """
        folder = inside(self.root, name, "models")
        if not holds_model(folder):
            listed = ", ".join(self.models()[:8]) or "none"
            raise DemoError(f"{printable(name, 120)} is not a model folder; choose from {listed}.")
        try:
            return self.load(str(folder), use)
        except UserError as error:
            raise DemoError(brief(error).replace(f"{self.root}/", "")) from error

    def classify(self, model: str, picture: str | None, names: str) -> dict[str, float]:
        """Classify a picture.

        Args:
            model: the folder of the model, relative to the root.
            picture: the path of the upload; None if there is none.
            names: the class names, separated by commas or line breaks.

        Returns:
            For each class name, its probability.

        Raises:
            DemoError: if the model, the picture or the names cannot be used.
        """
        require_text(names, "The class names", MAX_TOTAL)
        listed = list(dict.fromkeys(name.strip() for name in names.replace("\n", ",").split(",") if name.strip()))
        if not 1 < len(listed) <= MAX_NAMES:
            raise DemoError(f"Enter 2 to {MAX_NAMES} class names, separated by commas; got {len(listed)}.")
        for name in listed:
            bounded(name)
        return self.classify_among(self.predictor(model, "embed"), opened(picture), listed)

    def index(self, model: str, folder: str) -> Path:
        """The path of the index of a folder of pictures by a model."""
        key = f"{inside(self.root, model, 'models')} {inside(self.pictures, folder, 'pictures')}"
        return self.place / hashlib.sha256(key.encode()).hexdigest()[:16]

    def build(self, model: str, folder: str, progress) -> str:
        """Index a folder of pictures; if there is an index already, only new pictures are embedded.

        Args:
            model: the folder of the model, relative to the root.
            folder: the folder of pictures, relative to `pictures`.
            progress: called with the number of pictures done and their total.

        Returns:
            A message with the number of pictures, and those that were skipped by cause.

        Raises:
            DemoError: if the folder or the model cannot be used.
        """
        path = inside(self.pictures, folder, "pictures")
        if not path.is_dir():
            raise DemoError(f"There is no folder {printable(folder, 120)!r} in {self.pictures.name}.")
        try:
            name = str(inside(self.root, model, "models"))
            skipped = build(
                path, self.index(model, folder), name, predictor=self.predictor(model, "embed"), progress=progress
            )
        except UserError as error:
            raise DemoError(brief(error).replace(f"{self.pictures}/", "")) from error
        return f"Indexed pictures: {len(Index(self.index(model, folder))):,}. Skipped: {describe(skipped)}."

    def search(self, model: str, folder: str, words: str, picture: str | None) -> list[tuple[Image.Image, str]]:
        """Search a folder by words or, if there are none, by a picture.

        Args:
            model: the folder of the model, relative to the root.
            folder: the folder of pictures, relative to `pictures`.
            words: the query; "" to search by the picture.
            picture: the path of the upload; None if there is none.

        Returns:
            The pictures found, best first, each with its path and similarity.

        Raises:
            DemoError: if there is no index or no query.
        """
        try:
            index = Index(self.index(model, folder))
        except NoIndexError:
            raise DemoError("There is no index of this folder for this model yet: build it first.") from None
        predictor = self.predictor(model, "embed")
        require_text(words, "The query", MAX_CHARACTERS)
        if words.strip():
            query = predictor.embed_texts([bounded(words)])[0]
        elif picture:
            query = predictor.embed_images([opened(picture)])[0]
        else:
            raise DemoError("Enter a query, or choose a picture.")
        try:
            hits = index.search(query, RESULTS)
        except NoIndexError:
            raise DemoError("The index was built with another model of this name: build it again.") from None
        shown = []
        for hit in hits:
            try:
                path = inside(self.pictures, str(inside(self.pictures, folder, "pictures") / hit.path), "pictures")
                image = to_rgb(read_picture(path, MAX_PIXELS))
            except PictureError:
                continue  # deleted or changed since the index was built
            image.thumbnail((256, 256))
            shown.append((image, f"{printable(hit.path)}  {hit.score:.2f}"))
        return shown

    def caption(self, model: str, picture: str | None, prompt: str = "") -> Iterator[str]:
        """Generate a caption.

        Args:
            model: the folder of the model, relative to the root.
            picture: the path of the upload; None if there is none.
            prompt: the text that the caption continues.

        Yields:
            The caption as it grows, word by word.

        Raises:
            DemoError: if the model or the picture cannot be used, or generation fails.
        """
        bounded(prompt)
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
            raise DemoError(f"{printable(model, 120)} could not generate a caption: {brief(done[0])}") from done[0]
        yield done[0]

    def match(self, model: str, picture: str | None, text: str) -> tuple[dict[str, float], Image.Image | None]:
        """Match a picture with a text by the matching head (ITM) of a BLIP or BLIP-2.

        Args:
            model: the folder of the model, relative to the root.
            picture: the path of the upload; None if there is none.
            text: the text.

        Returns:
            The probabilities of "match" and "no match", and a heat map of the image regions that support the match
            (None for BLIP-2).

        Raises:
            DemoError: if the model, the picture or the text cannot be used.
        """
        if not bounded(text).strip():
            raise DemoError("Enter a text to match with the picture.")
        predictor, image = self.predictor(model, "match"), opened(picture)
        logits = predictor.match(predictor.encode_images([image]), torch.zeros(1, dtype=torch.long), [bounded(text)])[0]
        no, yes = logits.softmax(dim=0).tolist()
        heat = None
        if type(predictor) is BlipPredictor:
            grid = matching_maps(
                predictor.model, predictor.processor, predictor.prepare_images([image])["pixel_values"], bounded(text)
            ).maps[0]
            smaller = to_rgb(image)
            smaller.thumbnail((HEAT, HEAT))
            heat = overlay(smaller, grid)
        return {"match": yes, "no match": no}, heat

    def answer(self, model: str, picture: str | None, question: str) -> str:
        """Answer a question about a picture.

        Args:
            model: the folder of a BLIP or BLIP-2 that answers questions, relative to the root.
            picture: the path of the upload; None if there is none.
            question: the question.

        Raises:
            DemoError: if the model, the picture or the question cannot be used.
        """
        if not bounded(question).strip():
            raise DemoError("Enter a question.")
        image = opened(picture)
        return self.predictor(model, "answer").answer([image], [question], num_beams=1)[0]

    def compare(self, model: str, picture: str | None, first: str, second: str) -> tuple[dict, dict | None]:
        """Compare two captions of a picture, by similarity and by matching.

        Args:
            model: the folder of the model, relative to the root.
            picture: the path of the upload; None if there is none.
            first, second: the captions.

        Returns:
            For each caption, its share of the similarity, and the probability that it matches (None for a CLIP).

        Raises:
            DemoError: if the model, the picture or the captions cannot be used.
        """
        captions = [bounded(first).strip(), bounded(second).strip()]
        if not all(captions) or captions[0] == captions[1]:
            raise DemoError("Enter two different captions.")
        image = opened(picture)
        shares = self.classify_among(self.predictor(model, "embed"), image, captions)
        try:
            predictor = self.predictor(model, "match")
        except DemoError:
            return shares, None
        states = predictor.encode_images([image])
        logits = predictor.match(states, torch.zeros(2, dtype=torch.long), captions)
        return shares, dict(zip(captions, logits.softmax(dim=1)[:, 1].tolist(), strict=True))

    @staticmethod
    def classify_among(predictor: Predictor, image: Image.Image, texts: list[str]) -> dict[str, float]:
        """The probability of each text: that it is the one that describes the image; with SigLIP, each by itself."""
        embedded = torch.cat([predictor.embed_texts(batch) for batch in iter_batched(texts, 64)])
        logits = predictor.similarity(predictor.embed_images([image]), embedded)[0] / predictor.temperature
        bias = getattr(predictor.model, "logit_bias", None)  # SigLIP: each text by itself
        shares = logits.softmax(dim=0) if bias is None else (logits + bias).sigmoid()
        return dict(zip(texts, shares.tolist(), strict=True))


def supports(folder: Path, use: str) -> bool:
    """Whether a model supports a use, as far as its configuration tells."""
    try:
        config = read_config(folder)
        return not config.model_type.startswith("vlp_") or use in row_of(folder, config).uses
    except UserError:
        return True  # choosing it shows the reason


def inside(root: Path, name: str, what: str) -> Path:
    """Resolve a path and check that it is inside a folder.

    Args:
        root: the folder.
        name: a path relative to it.
        what: what the folder contains, for the error message.

    Raises:
        DemoError: if the path is outside the folder.
    """
    require_text(name, f"The folder of {what}", MAX_CHARACTERS)
    try:
        path = (root / (name or ".")).resolve()
        path.exists()
    except (OSError, ValueError, RuntimeError):
        raise DemoError(f"{printable(name, 120)} is not the name of a folder.") from None
    if not path.is_relative_to(root):
        raise DemoError(f"{printable(name, 120)} is outside the folder of {what} that this page may read.")
    return path


def opened(picture: str | None) -> Image.Image:
    """Read an upload, with its EXIF orientation applied.

    Raises:
        DemoError: if there is no upload, it is too large, or it cannot be read.
    """
    if not picture:
        raise DemoError("Choose a picture first.")
    require_text(picture, "The picture", MAX_CHARACTERS)
    try:
        size = os.path.getsize(picture) if os.path.isfile(picture) else None
    except (OSError, ValueError):
        size = None
    if size is None:
        raise DemoError("The picture is not there any more: upload it again.")
    if size > MAX_BYTES:
        raise DemoError(f"The picture is larger than {MAX_BYTES // 1_000_000} MB.")
    try:
        return read_picture(picture, MAX_PIXELS)
    except PictureError as error:
        most = f"; at most {MAX_PIXELS // 1_000_000} million pixels" if "bomb" in str(error) else ""
        raise DemoError(f"The picture cannot be read: {error}{most}.") from None


def bounded(text: str) -> str:
    """The text itself. Raises DemoError if it is no text, too long, or contains what no tokenizer reads."""
    return require_text(text, "The text", MAX_CHARACTERS)


def require_text(value: object, what: str, most: int) -> str:
    """The value itself.

    Args:
        value: what a visitor entered.
        what: what it is, for the error message.
        most: maximum number of characters.

    Raises:
        DemoError: if it is no text, too long, or contains a NUL or a lone half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise DemoError(f"{what} must be a text.")
    if len(value) > most:
        raise DemoError(f"{what} has {len(value):,} characters; the maximum is {most:,}.")
    if not is_valid(value):
        raise DemoError(f"{what} contains a character that is not valid.")
    return value


def embedded_pictures(place: Path) -> Path:
    """Write the test split of the embedded data set as files, so that the demo can search it.

    Args:
        place: folder in which the folder "emoji" is created.

    Returns:
        The folder of the pictures.
    """
    folder = place / "emoji"
    if not (folder / "LICENCE.txt").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for row in load_rows("emoji", "test", "image"):
            (folder / f"{row['caption'].replace('/', '-')}.webp").write_bytes(row["image"]["bytes"])
        (folder / "LICENCE.txt").write_text("Twemoji (emoji-datasource-twitter 16.0.0), CC BY 4.0.\n")
    return folder


class OnlyOwnRequests:
    """Refuses requests of other web sites and requests that are too large, as ASGI middleware.

    A page that a visitor has open elsewhere can send requests here; with DNS rebinding it can also read the answers,
    but then the header Host has the name of that page.

    Args:
        app: the application.
        host: the address that the server listens on.
    """

    def __init__(self, app, host: str):
        self.app, self.host = app, host

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin1").lower(): value.decode("latin1") for name, value in scope["headers"]}
        reason, status = self.refusal(headers), 403
        most = MAX_BYTES + MAX_BODY if scope["path"].rstrip("/").endswith("/upload") else MAX_BODY
        if reason is None and not headers.get("content-length", "0").isdigit():
            reason = "The header Content-Length is no number."
        elif reason is None and int(headers.get("content-length", "0")) > most:
            reason, status = f"A request has at most {most:,} bytes.", 413
        if reason is not None:
            answer = {"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]}
            await send(answer)
            await send({"type": "http.response.body", "body": reason.encode()})
            return
        received = 0

        async def bounded_receive():
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            return message if received <= most else {"type": "http.disconnect"}

        await self.app(scope, bounded_receive, send)

    def refusal(self, headers: dict[str, str]) -> str | None:
        """Why a request is refused; None if it is not."""
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self.is_own(host):
            return "The header Host does not name this server."
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            return "The request comes from another web site."
        if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
            return "The request comes from another web site."
        return None

    def is_own(self, host: str) -> bool:
        """Whether a Host header names this server: an address, or a name that no other site can have."""
        name = re.sub(r":\d+$", "", host).strip("[]").lower()
        if name in ("localhost", "127.0.0.1", "::1", self.host.strip("[]").lower()):
            return True
        if self.host not in ("0.0.0.0", "::"):
            return False
        try:  # open to the network: an address cannot be that of a name of another site
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name == socket.gethostname().lower()


def main() -> None:
    """The command `vlp demo`."""
    parser = CommandParser(prog="vlp demo", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--pictures", type=Path, help="folder of pictures to search (default: the embedded drawings)")
    parser.add_argument(
        "--indexes", type=Path, default=Path("runs/demo"), help="folder for the indexes (default: runs/demo)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port (default: 7860)")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for this name and password")
    with reported_errors():
        serve(parser.parse_args())


def require_free(host: str, port: int) -> None:
    """Raise ArgumentError if another program uses a port."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ArgumentError(f"--host {printable(host, 60)} --port {port}: {brief(error.strerror)}.") from None


def serve(options: argparse.Namespace) -> None:
    """Serve the page until the program is interrupted.

    Args:
        options: the options of `vlp demo`.

    Raises:
        ArgumentError: if an option is wrong.
        OSError: if the port is in use.
    """
    if not 0 < options.port < 65536:
        raise ArgumentError(f"--port must be from 1 to 65535, got {printable(options.port, 40)}.")
    if not options.host.strip() or not is_valid(options.host):
        raise ArgumentError(f"--host must be an address, such as 127.0.0.1; got {printable(repr(options.host), 60)}.")
    require_free(options.host, options.port)
    if options.auth is not None and not all(options.auth.partition(":")):
        raise ArgumentError("--auth must be USER:PASSWORD.")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from . import demo_page

    try:
        import gradio as gr
        from starlette.middleware import Middleware
    except ModuleNotFoundError:
        raise ArgumentError('the demo requires gradio: pip install "vlp[demo]".') from None
    if options.pictures and not usable_path(options.pictures, "--pictures").is_dir():
        raise ArgumentError(f"--pictures {printable(options.pictures, 120)}: there is no such folder.")
    indexes = usable_path(options.indexes, "--indexes")
    if os.path.lexists(indexes) and not indexes.is_dir():
        raise ArgumentError(f"--indexes {printable(indexes, 120)} is {kind_of(indexes)}, not a folder.")
    pictures = usable_path(options.pictures, "--pictures") if options.pictures else embedded_pictures(indexes)
    demo = Demo(Path.cwd(), pictures, indexes / "indexes")
    if not demo.models():
        print("There is no model in model_cards/ or runs/: train one with `make train`.")
    if not options.pictures and (found := demo.models("embed")):
        print("Preparing the search of the included drawings ...", flush=True)
        model = next((name for name in found if name.endswith("/clip-emoji")), found[0])
        try:
            demo.build(model, ".", lambda done, total: None)
        except DemoError as error:
            print(f"warning: the drawings cannot be searched yet: {brief(error)}")
    theme = gr.themes.Default(font=demo_page.THEME_FONT, font_mono=["monospace"])
    user, _, password = (options.auth or "").partition(":")
    with tempfile.TemporaryDirectory() as place:  # gradio copies the examples to its own cache
        blocks = demo_page.page(demo, demo_page.write_examples(Path(place)))
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):  # gradio's own waiting loses a Ctrl-C that comes early
            signal.signal(number, lambda *_: stopped.set())
        blocks.queue(default_concurrency_limit=1, max_size=32).launch(
            server_name=options.host, server_port=options.port, share=False, max_file_size=MAX_BYTES, theme=theme,
            prevent_thread_lock=True, footer_links=[], ssr_mode=False, css=demo_page.STYLE, quiet=True,
            auth=[(user, password)] if options.auth else None,
            app_kwargs={"middleware": [Middleware(OnlyOwnRequests, host=options.host)]},
        )  # fmt: skip
        print(f"The demo is running at http://{options.host}:{options.port} (press Ctrl-C to stop).", flush=True)
        stopped.wait()
        blocks.close(verbose=False)


if __name__ == "__main__":
    main()
