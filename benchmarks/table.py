"""Print one table of all comparisons with other libraries, from the stored results; the last step of `make bench`.

python benchmarks/table.py
"""

import json
import statistics
from pathlib import Path

FOLDER = Path(__file__).parent
HEADS = {
    "en": "| 2 CPU cores, float32, interleaved runs | vlp, median (range) | compared with | median (range) | vlp is |",
    "vi": "| 2 nhân CPU, float32, đo xen kẽ | vlp, trung vị (khoảng) | so với | trung vị (khoảng) | vlp |",
}
TIMES = {"en": "{:.2f} times as fast", "vi": "nhanh gấp {:.2f} lần"}
PRODUCTS = "Large matrix products with as many operations as those of vlp's step of {} take {:.0f} % of its time."
FIRST_STEP = "From starting `training clip` to the end of its first step on the bundled data: {:.1f} s."
# The rows of the READMEs: the label, the model if there are several, and the peer.
SHORT = (
    ("clip", "ViT-B-32", "open_clip"), ("clip", "ViT-B-32", "open_clip, memory kept, short context"),
    ("clip", "ViT-B-32", "transformers"), ("blip", None, "LAVIS"), ("caption", None, "transformers"),
    ("caption2", None, "transformers"),
)  # fmt: skip
LABELS = {
    "clip": {"en": "a training step of CLIP {model}, batch {batch}, captions of 8 to 18 tokens",
             "vi": "một bước huấn luyện CLIP {model}, lô {batch}, chú thích 8 đến 18 token"},
    "blip": {"en": "a pre-training step of BLIP-base, {image_size} px, batch {batch}",
             "vi": "một bước tiền huấn luyện BLIP-base, {image_size} px, lô {batch}"},
    "caption": {"en": "captioning with BLIP-base, {image_size} px, batch {batch}, {beams} beams, {tokens} tokens",
              "vi": "tạo chú thích bằng BLIP-base, {image_size} px, lô {batch}, {beams} beam, {tokens} token"},
    "caption2": {"en": "captioning with BLIP-2, OPT-{language_model}, batch {batch}, {beams} beams, {tokens} tokens",
               "vi": "tạo chú thích bằng BLIP-2, OPT-{language_model}, lô {batch}, {beams} beam, {tokens} token"},
    "features": {"en": "a training step of BLIP-2, stage 1, `--cache_vision_features`, batch {batch}",
                 "vi": "một bước huấn luyện BLIP-2, giai đoạn một, `--cache_vision_features`, lô {batch}"},
    "loss": {"en": "the contrastive loss and its gradient, batch {batch:,} x {width}",
             "vi": "hàm mất mát tương phản và gradient của nó, lô {batch:,} x {width}"},
    "zero_shot": {"en": "transformers' zero-shot pipeline, {labels:,} labels x {images} images",
                  "vi": "pipeline zero-shot của transformers, {labels:,} nhãn x {images} ảnh"},
    "shards": {"en": "reading {samples:,} samples from shards, {workers} workers",
               "vi": "đọc {samples:,} mẫu từ shard, {workers} worker"},
    "startup": {"en": "importing vlp, or CLIP from transformers",
                "vi": "import vlp, hoặc CLIP của transformers"},
}  # fmt: skip
PEERS = {
    "step, tower computed": {"en": "computing the tower in each step", "vi": "tính tháp ảnh trong mỗi bước"},
    "open_clip, memory kept, short context": {
        "en": "open_clip with vlp's memory setting and a context of 18 tokens",
        "vi": "open_clip với thiết lập bộ nhớ của vlp và ngữ cảnh 18 token"},
    "vlp, compiled": {"en": "vlp with `--torch_compile`", "vi": "vlp với `--torch_compile`"},
    "open_clip, compiled": {
        "en": "open_clip with the same settings and torch.compile",
        "vi": "open_clip với cùng thiết lập đó và torch.compile"},
    "transformers, compiled": {"en": "transformers with torch.compile", "vi": "transformers với torch.compile"},
    "webdataset": {"en": "webdataset, set up as in open_clip", "vi": "webdataset, thiết lập như trong open_clip"},
}  # fmt: skip


def stored(name: str) -> dict:
    path = FOLDER / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def measured() -> list[tuple[str, dict, list[float], str, list[float]]]:
    """The rows of the table, in order: (key of LABELS, settings, seconds of vlp, name of the peer, its seconds)."""
    rows = []

    def add(label: str, facts: dict, ours: str = "vlp") -> None:
        seconds = facts.get("seconds", {})
        for peer, values in seconds.items():
            if peer not in (ours, "products"):
                rows.append((label, facts, seconds[ours], peer, values))

    for model, facts in stored("clip_step").items():
        add("clip", facts | {"model": model.partition(",")[0]})
    add("blip", stored("blip_step"))
    if facts := stored("blip_generate"):
        add("caption", facts | {"seconds": {name: parts["whole"] for name, parts in facts["seconds"].items()}})
    add("caption2", stored("blip2_generate"))
    if facts := stored("blip2_features"):
        steps = {name: facts["seconds"][name] for name in ("step, features read", "step, tower computed")}
        add("features", facts | {"seconds": steps}, "step, features read")
    for label, name in (("loss", "contrastive_loss"), ("zero_shot", "zero_shot"), ("shards", "shards"),
                        ("startup", "startup")):  # fmt: skip
        add(label, stored(name))
    return rows


def table(language: str = "en", short: bool = False) -> str:
    """The table in Markdown.

    Args:
        language: "en" or "vi", which is for short tables alone.
        short: only the rows of the READMEs.
    """
    lines = [HEADS[language], "| --- " * 5 + "|"]
    for label, facts, ours, peer, theirs in measured():
        if short and (label, facts["model"] if label == "clip" else None, peer) not in SHORT:
            continue
        ratio = statistics.median(theirs) / statistics.median(ours)
        shown = PEERS.get(peer, {}).get(language, peer)
        what = LABELS[label][language].format(**facts)
        lines.append(f"| {what} | {spread(ours)} | {shown} | {spread(theirs)} | {TIMES[language].format(ratio)} |")
    if short:
        return "\n".join(lines)
    lines.append("")
    for model, facts in stored("clip_step").items():
        if "share_of_the_products" in facts and "," not in model:
            lines.append(PRODUCTS.format(model, 100 * facts["share_of_the_products"]))
    if steps := stored("startup").get("first_step"):
        lines += ["", FIRST_STEP.format(statistics.median(steps))]
    return "\n".join(lines)


def spread(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.2f} s ({min(seconds):.2f} – {max(seconds):.2f})"


if __name__ == "__main__":
    print(table())
