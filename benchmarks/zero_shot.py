"""Time transformers' zero-shot pipeline with 1,000 labels and 50 images: vlp's model and transformers' CLIPModel.

    python benchmarks/zero_shot.py [--labels 1000] [--images 50] [--rounds 2]

CLIP ViT-B/32 with the same random weights, tokenizer and image processing; names and pictures of the bundled data. Each
step starts with an empty cache of label embeddings. The scores of both are compared first.
"""

import argparse
import io
import json
import sys
import tempfile
from pathlib import Path

import clip
import torch
import transformers
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer, pipeline
from vlp.training.data.sources import load_rows
from vlp.training.machine.hardware import cpu_cores
from workers import interleave, report, serve

import vlp

RESULTS = Path(__file__).with_suffix(".json")
TASK = "zero-shot-image-classification"
MERGES = Path(clip.__file__).with_name("bpe_simple_vocab_16e6.txt.gz")


def make(contender: str, folder: str):
    """The pipeline of a contender, and a function that clears its cache of label embeddings."""
    torch.manual_seed(0)
    ours = vlp.VlpClipModel(vlp.VlpClipConfig(vision_config={"patch_size": 32})).eval()
    vlp.VlpClipTokenizer.from_openai_merges(MERGES, 77).save_pretrained(folder)
    tokenizer = CLIPTokenizer.from_pretrained(folder)
    parts = {"tokenizer": tokenizer, "image_processor": CLIPImageProcessor()}
    if contender == "vlp":
        return pipeline(TASK, model=ours, **parts), lambda: setattr(ours.known_texts, "last", None)
    theirs = CLIPModel(CLIPConfig(vision_config={"patch_size": 32}, text_config={"eos_token_id": 49407})).eval()
    theirs.load_state_dict(ours.state_dict(), strict=False)
    return pipeline(TASK, model=theirs, **parts), lambda: None


def work(contender: str, labels: int, images: int, folder: str) -> None:
    """Run a contender in this process: store its scores, then serve steps (see `workers.serve`)."""
    rows = load_rows("emoji", "train", "image")
    names = list(dict.fromkeys(rows["caption"]))[:labels]
    assert len(names) == labels
    pictures = [Image.open(io.BytesIO(rows[number]["image"]["bytes"])).convert("RGB") for number in range(images)]
    torch.set_num_threads(cpu_cores())
    classify, clear_cache = make(contender, folder)
    found = classify(pictures[0], candidate_labels=names[:50])
    Path(folder, f"{contender}.json").write_text(json.dumps({entry["label"]: entry["score"] for entry in found}))

    def step(number: int) -> None:
        clear_cache()
        classify(pictures if number else pictures[:2], candidate_labels=names)  # the first step is a warm-up

    serve(step)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--labels", type=int, default=1000)
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", nargs=2, metavar=("CONTENDER", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        return work(options.work[0], options.labels, options.images, options.work[1])
    words = [sys.executable, __file__, "--labels", str(options.labels), "--images", str(options.images), "--work"]
    with tempfile.TemporaryDirectory() as folder:

        def compare() -> None:
            ours, theirs = (json.loads(Path(folder, f"{name}.json").read_text()) for name in ("vlp", "transformers"))
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

        commands = {name: [*words, name, folder] for name in ("vlp", "transformers")}
        seconds = interleave(commands, options.rounds, started=compare)
    report(
        RESULTS,
        seconds,
        labels=options.labels,
        images=options.images,
        versions={"torch": torch.__version__, "transformers": transformers.__version__, "vlp": vlp.__version__},
    )


if __name__ == "__main__":
    main()
