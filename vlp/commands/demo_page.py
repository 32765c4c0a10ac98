"""The layout of the demo's page, with pictures to try in each tab."""

import contextlib
import functools
import html
import random
from dataclasses import dataclass
from pathlib import Path

from ..errors import brief
from ..training.data.scenes.rows import question_rows, swap_rows
from ..training.data.sources import load_rows
from .demo import Demo, DemoError

DRAWINGS = ("red apple", "rocket", "grinning face", "dog face")  # that are tried in the tabs
SCENES = 3  # as many scenes are tried
SEED = 2  # of the scenes
THEME_FONT = ["system-ui", "sans-serif"]  # no fonts from the web
STYLE = """
.gradio-container, .gradio-container > main { width: 100% !important; max-width: 62rem !important; margin: 0 auto; }
#head p { margin: 0; }
@media (max-width: 640px) { .gradio-container { padding: 0.5rem !important; } }
"""


@dataclass
class Examples:
    """Pictures to try.

    Attributes:
        drawings: the paths of drawings of emoji, by their names.
        questions: paths of scenes, each with a question about it.
        captions: paths of scenes, each with a true caption and one of the same words that is wrong.
    """

    drawings: dict[str, str]
    questions: list[list[str]]
    captions: list[list[str]]


def write_examples(place: Path) -> Examples:
    """Write the pictures to try as files.

    Args:
        place: an empty folder.
    """
    drawings, questions, captions = {}, [], []
    rows = load_rows("emoji", "test", "image")
    names = list(rows["caption"])
    for name in DRAWINGS:
        path = place / f"{name}.webp"
        path.write_bytes(rows[names.index(name)]["image"]["bytes"])
        drawings[name] = str(path)
    for number in range(SCENES):
        path = place / f"scene-{number}.jpg"
        asked = next(iter(question_rows(f"{number}", "test", random.Random(f"{SEED} {number}"))))
        path.write_bytes(asked["image"]["bytes"])
        questions.append([str(path), asked["question"]])
        path = place / f"words-{number}.jpg"
        swapped = next(iter(swap_rows(f"{number}", "test", random.Random(f"{SEED} {number}"))))
        path.write_bytes(swapped["image"]["bytes"])
        captions.append([str(path), swapped["caption"], swapped["wrong"]])
    return Examples(drawings, questions, captions)


def page(demo: Demo, examples: Examples):
    """Build the page, as gradio's Blocks. Each tab begins with what to enter, its result, and examples."""
    import gradio as gr

    @contextlib.contextmanager
    def errors_shown():
        """Show the message of a DemoError on the page."""
        try:
            yield
        except DemoError as error:
            raise gr.Error(html.escape(brief(error)), print_exception=False) from error
        except Exception as error:
            text = f"The request could not be served: {brief(error)[:200]}"
            raise gr.Error(html.escape(text), print_exception=False) from error

    def guarded(function):
        @functools.wraps(function)  # keeps the names of the parameters for the API
        def call(*values):
            with errors_shown():
                return function(*values)

        return call

    @functools.wraps(demo.caption)
    def caption(*values):
        with errors_shown():
            yield from demo.caption(*values)

    def build_index(model, folder, progress=gr.Progress()):  # noqa: B008 (gradio detects it by its default)
        with errors_shown():
            return demo.build(model, folder, lambda done, total: progress((done, total), unit="pictures"))

    def choose(tab: str, use: str, preferred: str):
        """The choice of a model, folded away below the examples."""
        found = demo.models(use)
        first = next((name for name in found if Path(name).name == preferred), found[0] if found else None)
        with gr.Accordion(f"Model: {first or 'none found'}", open=False):
            return gr.Dropdown(
                found, value=first, label="Model", allow_custom_value=True, elem_id=f"{tab}-model",
                info="Folder of a model, relative to the folder in which the demo was started.",
            )  # fmt: skip

    def picture(tab: str, value: str | None = None):
        found = gr.Image(value, type="filepath", image_mode=None, sources=["upload", "webcam", "clipboard"],
                        label="Picture", elem_id=f"{tab}-picture", height=240)  # fmt: skip
        read = found.preprocess

        def path_of(upload):
            """The path of an upload: the demo reads it itself, so that a file that is no picture is explained."""
            given = upload is not None and upload.path and not (upload.url or "").startswith("data:")
            return str(upload.path) if given else read(upload)

        found.preprocess = path_of  # a subclass would make gradio write a file next to this one
        return found

    def button(tab: str, words: str):
        return gr.Button(words, variant="primary", elem_id=f"{tab}-go")

    def tried(rows: list[list], inputs: list):
        gr.Examples(rows, inputs, label="Examples")

    first, *others = examples.drawings.values()
    with gr.Blocks(title="vlp", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("# vlp\nTry your own CLIP, BLIP and BLIP-2. Everything runs on this machine.", elem_id="head")
        with gr.Tab("Classify", id="classify"):
            with gr.Row():
                with gr.Column():
                    classify_picture = picture("classify", first)
                    names = gr.Textbox(
                        ", ".join(examples.drawings), label="Names to choose from, separated by commas", lines=2,
                        elem_id="classify-names",
                    )  # fmt: skip
                    classify = button("classify", "Classify")
                classes = gr.Label(label="Result", num_top_classes=10, elem_id="classify-result")
            tried([[path] for path in (first, *others)], [classify_picture])
            classify_model = choose("classify", "embed", "clip-emoji")
        with gr.Tab("Search", id="search"):
            with gr.Row():
                with gr.Column(scale=1):
                    words = gr.Textbox(label="What do you look for?", placeholder="a red apple", elem_id="search-words")
                    search = button("search", "Search")
                    with gr.Accordion("Search by a picture", open=False):
                        search_picture = picture("search")
                results = gr.Gallery(label="Pictures found", columns=3, elem_id="search-result", scale=2)
            tried([["red apple"], ["sports"], ["animal face"]], [words])
            with gr.Accordion(f"Folder: {demo.pictures.name}", open=False):
                folder = gr.Textbox(".", label=f"Folder in {demo.pictures.name}", elem_id="search-folder")
                index = gr.Button("Build or update the index", elem_id="search-build")
                status = gr.Textbox(label="Index", interactive=False, elem_id="search-state")
            search_model = choose("search", "embed", "clip-emoji")
        with gr.Tab("Caption", id="caption"):
            with gr.Row():
                with gr.Column():
                    caption_picture = picture("caption", first)
                    prompt = gr.Textbox(label="How the caption begins (optional)", elem_id="caption-prompt")
                    generate = button("caption", "Caption")
                generated = gr.Textbox(label="Caption", elem_id="caption-result", interactive=False)
            tried([[path] for path in (first, *others)], [caption_picture])
            caption_model = choose("caption", "caption", "blip-emoji")
        with gr.Tab("Match", id="match"):
            with gr.Row():
                with gr.Column():
                    match_picture = picture("match", examples.captions[0][0])
                    text = gr.Textbox(examples.captions[0][1], label="Text", elem_id="match-text")
                    match = button("match", "Match")
                with gr.Column():
                    probabilities = gr.Label(label="Does the text describe the picture?", elem_id="match-result")
                    heat = gr.Image(label="Where the model looks (Grad-CAM)", interactive=False, elem_id="match-heat",
                                    height=240, buttons=["download", "fullscreen"])  # fmt: skip
            tried([[path, each] for path, *both in examples.captions for each in both], [match_picture, text])
            match_model = choose("match", "match", "blip-scenes")
        with gr.Tab("Ask", id="ask"):
            with gr.Row():
                with gr.Column():
                    ask_picture = picture("ask", examples.questions[0][0])
                    question = gr.Textbox(examples.questions[0][1], label="Question", elem_id="ask-question")
                    ask = button("ask", "Ask")
                answer = gr.Textbox(label="Answer", elem_id="ask-result", interactive=False)
            tried(examples.questions, [ask_picture, question])
            ask_model = choose("ask", "answer", "blip-scenes-vqa")
        with gr.Tab("Word order", id="order"):
            gr.Markdown("Two captions of the same words, one of them true: embeddings hardly see the difference; "
                        "matching (ITM), which reads picture and text together, does.")  # fmt: skip
            with gr.Row():
                with gr.Column():
                    order_picture = picture("order", examples.captions[0][0])
                    true = gr.Textbox(examples.captions[0][1], label="One caption", elem_id="order-first")
                    false = gr.Textbox(examples.captions[0][2], label="Another", elem_id="order-second")
                    compare = button("order", "Compare")
                with gr.Column():
                    similar = gr.Label(label="By similarity (shares add up to 100 %)", elem_id="order-similarity")
                    matched = gr.Label(label="By matching (each by itself)", elem_id="order-match")
            tried(examples.captions, [order_picture, true, false])
            order_model = choose("order", "match", "blip-scenes")

        classify.click(guarded(demo.classify), [classify_model, classify_picture, names], classes, api_name="classify")
        index.click(build_index, [search_model, folder], status, api_name="index")
        for event in (search.click, words.submit):
            event(guarded(demo.search), [search_model, folder, words, search_picture], results, api_name="search")
        generate.click(caption, [caption_model, caption_picture, prompt], generated, api_name="caption")
        match.click(guarded(demo.match), [match_model, match_picture, text], [probabilities, heat], api_name="match")
        for event in (ask.click, question.submit):
            event(guarded(demo.answer), [ask_model, ask_picture, question], answer, api_name="answer")
        compare.click(guarded(demo.compare), [order_model, order_picture, true, false], [similar, matched],
                      api_name="compare")  # fmt: skip
    return blocks
