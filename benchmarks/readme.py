"""Write the measured figures into README.md and README.vi.md, between their markers, from the stored results.

python benchmarks/readme.py [--check]
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = {
    "README.md": {
        "head": "| five minutes on 2 CPU cores, mean of {seeds} seeds (lowest to highest) | {title} |",
        "rows": {
            "zero_shot_top1": "zero-shot top-1, {classes} names",
            "zero_shot_top5": "zero-shot top-5",
            "text_to_image_recall_at_1": "text to image, R@1",
            "image_to_text_recall_at_1": "image to text, R@1",
            "text_to_image_recall_at_10": "text to image, R@10",
        },
        "step": "A whole training step of ViT-B/32 (forward, backward, AdamW; batch {batch}, {threads} CPU threads, "
        "captions of 8 to 18 tokens), each set up as its own trainer does it: vlp {ours:.2f} s, open_clip "
        "{theirs:.2f} s, medians of {rounds} interleaved steps each: **{ratio:.2f} times** open_clip's samples/s with "
        "the same gradients, and "
        "{kept:.2f} times where open_clip is given vlp's memory setting too (`make bench`).",
    },
    "README.vi.md": {
        "head": "| năm phút trên 2 nhân CPU, trung bình của {seeds} seed (thấp nhất đến cao nhất) | {title} |",
        "rows": {
            "zero_shot_top1": "zero-shot top-1, {classes} tên",
            "zero_shot_top5": "zero-shot top-5",
            "text_to_image_recall_at_1": "văn bản sang ảnh, R@1",
            "image_to_text_recall_at_1": "ảnh sang văn bản, R@1",
            "text_to_image_recall_at_10": "văn bản sang ảnh, R@10",
        },
        "step": "Một bước huấn luyện trọn vẹn của ViT-B/32 (lan truyền xuôi, ngược, AdamW; lô {batch}, {threads} luồng "
        "CPU, chú thích 8 đến 18 token), mỗi bên được thiết lập như trình huấn luyện của nó: vlp {ours:.2f} s, "
        "open_clip {theirs:.2f} s, trung vị của {rounds} bước đo xen kẽ: **{ratio:.2f} lần** số mẫu/giây của open_clip "
        "với gradient như nhau, và {kept:.2f} lần khi open_clip cũng được thiết lập bộ nhớ của vlp (`make bench`).",
    },
}


def results_block(words: dict) -> str:
    seeds = json.loads((ROOT / "benchmarks/emoji_seeds.json").read_text())
    lines = []
    for config, result in seeds.items():
        runs = result["seeds"]
        lines += [words["head"].format(seeds=len(runs), title=f"`{config}`"), "| --- | --- |"]
        for name, title in words["rows"].items():
            value, classes = result["summary"][name], next(iter(runs.values()))["classes"]
            span = f"{100 * value['min']:.1f} – {100 * value['max']:.1f}"
            lines.append(f"| {title.format(classes=f'{classes:,}')} | {100 * value['mean']:.1f} % ({span}) |")
        lines.append("")
    step = json.loads((ROOT / "benchmarks/clip_step.json").read_text())
    median = {name: sorted(values)[len(values) // 2] for name, values in step["seconds"].items()}
    lines.append(
        words["step"].format(
            batch=step["batch"],
            threads=step["threads"],
            rounds=len(step["seconds"]["vlp"]),
            ours=median["vlp"],
            theirs=median["open_clip"],
            ratio=step["ratios_of_medians"]["open_clip"],
            kept=step["ratios_of_medians"]["open_clip, memory kept"],
        )
    )
    return "\n".join(lines)


def render(name: str) -> str:
    """The README as it should be."""
    text = (ROOT / name).read_text()
    block = f"<!-- results -->\n{results_block(WORDS[name])}\n<!-- end of results -->"
    return re.sub(r"<!-- results -->.*<!-- end of results -->", lambda _: block, text, flags=re.DOTALL)


if __name__ == "__main__":
    for name in WORDS:
        if "--check" not in sys.argv:
            (ROOT / name).write_text(render(name))
        elif render(name) != (ROOT / name).read_text():
            sys.exit(f"{name} does not tell the stored results: run `make readme`.")
