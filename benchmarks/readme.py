"""Write the measured figures into README.md and README.vi.md, between their markers, from the stored results.

python benchmarks/readme.py [--check]
"""

import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
WORDS = {
    "README.md": {
        "head": "| {minutes} minutes on {hardware}, mean of {seeds} seeds (lowest to highest) | {title} |",
        "hardware": "2 CPU cores",
        "rows": {
            "zero_shot_top1": "zero-shot top-1, {classes} names",
            "zero_shot_top5": "zero-shot top-5",
            "text_to_image_recall_at_1": "text to image, R@1",
            "image_to_text_recall_at_1": "image to text, R@1",
            "text_to_image_recall_at_10": "text to image, R@10",
            "reranked_text_to_image_recall_at_1": "text to image, R@1, re-ranked by ITM",
            "reranked_image_to_text_recall_at_1": "image to text, R@1, re-ranked by ITM",
            "itm_accuracy": "ITM accuracy on pairs and their hardest wrong captions",
            "caption_exact": "captions that are exactly the name",
            "bleu_4": "captions, BLEU-4",
            "cider": "captions, CIDEr",
        },
        "step": "A whole training step of ViT-B/32 (forward, backward, AdamW; batch {batch}, {threads} CPU threads, "
        "captions of 8 to 18 tokens), each set up as its own trainer does it: vlp {ours:.2f} s, open_clip "
        "{theirs:.2f} s, medians of {rounds} interleaved steps each: **{ratio:.2f} times** open_clip's samples/s with "
        "the same gradients, and "
        "{kept:.2f} times where open_clip is given vlp's memory setting too (`make bench`).",
        "blip": "A whole pre-training step of BLIP-base ({size} px, batch {batch}, captions of 6 to 15 tokens): vlp "
        "{ours:.1f} s, LAVIS {theirs:.1f} s, medians of {rounds} interleaved steps: **{ratio:.2f} times** LAVIS' "
        "samples/s. Captions of BLIP-base ({caption_size} px, batch {caption_batch}, {beams} beams, {tokens} tokens): "
        "vlp {caption_ours:.1f} s, transformers {caption_theirs:.1f} s, the same tokens: {caption_ratio:.2f} times as "
        "fast, and {outside:.2f} times outside the vision tower.",
        "blip2": "Writing with BLIP-2 (ViT-L/14, the paper's Q-Former, OPT-{llm}; batch {batch}, {beams} beams, "
        "{tokens} tokens): vlp {ours:.1f} s, transformers {theirs:.1f} s, the same tokens, medians of {rounds} "
        "interleaved runs: **{ratio:.2f} times** as fast. With `--cache_vision_features` the features of a frozen "
        "ViT-B/16 are read {features:.0f} times as fast as computed, and a whole step of stage 1 is "
        "{step:.2f} times as fast.",
    },
    "README.vi.md": {
        "head": "| {minutes} phút trên {hardware}, trung bình của {seeds} seed (thấp nhất đến cao nhất) | {title} |",
        "hardware": "2 nhân CPU",
        "rows": {
            "zero_shot_top1": "zero-shot top-1, {classes} tên",
            "zero_shot_top5": "zero-shot top-5",
            "text_to_image_recall_at_1": "văn bản sang ảnh, R@1",
            "image_to_text_recall_at_1": "ảnh sang văn bản, R@1",
            "text_to_image_recall_at_10": "văn bản sang ảnh, R@10",
            "reranked_text_to_image_recall_at_1": "văn bản sang ảnh, R@1, xếp lại bằng ITM",
            "reranked_image_to_text_recall_at_1": "ảnh sang văn bản, R@1, xếp lại bằng ITM",
            "itm_accuracy": "độ chính xác ITM trên các cặp đúng và chú thích sai khó nhất",
            "caption_exact": "chú thích trùng khớp với tên",
            "bleu_4": "chú thích, BLEU-4",
            "cider": "chú thích, CIDEr",
        },
        "step": "Một bước huấn luyện trọn vẹn của ViT-B/32 (lan truyền xuôi, ngược, AdamW; lô {batch}, {threads} luồng "
        "CPU, chú thích 8 đến 18 token), mỗi bên được thiết lập như trình huấn luyện của nó: vlp {ours:.2f} s, "
        "open_clip {theirs:.2f} s, trung vị của {rounds} bước đo xen kẽ: **{ratio:.2f} lần** số mẫu/giây của open_clip "
        "với gradient như nhau, và {kept:.2f} lần khi open_clip cũng được thiết lập bộ nhớ của vlp (`make bench`).",
        "blip": "Một bước huấn luyện trọn vẹn của BLIP-base ({size} px, lô {batch}, chú thích 6 đến 15 token): vlp "
        "{ours:.1f} s, LAVIS {theirs:.1f} s, trung vị của {rounds} bước đo xen kẽ: **{ratio:.2f} lần** số mẫu/giây của "
        "LAVIS. Viết chú thích bằng BLIP-base ({caption_size} px, lô {caption_batch}, {beams} beam, {tokens} token): "
        "vlp {caption_ours:.1f} s, transformers {caption_theirs:.1f} s, cùng các token: nhanh gấp {caption_ratio:.2f} "
        "lần, và {outside:.2f} lần nếu không tính tháp ảnh.",
        "blip2": "Viết bằng BLIP-2 (ViT-L/14, Q-Former của bài báo, OPT-{llm}; lô {batch}, {beams} beam, {tokens} "
        "token): vlp {ours:.1f} s, transformers {theirs:.1f} s, cùng các token, trung vị của {rounds} lần đo xen kẽ: "
        "nhanh gấp **{ratio:.2f} lần**. Với `--cache_vision_features`, đặc trưng của một ViT-B/16 đóng băng được đọc "
        "nhanh gấp {features:.0f} lần so với tính lại, và cả bước huấn luyện giai đoạn một nhanh gấp {step:.2f} lần.",
    },
}


def results_block(words: dict) -> str:
    seeds = json.loads((ROOT / "benchmarks/emoji_seeds.json").read_text())
    lines = []
    for config, result in seeds.items():
        runs = result["seeds"]
        minutes = round(max(run["training_seconds"] for run in runs.values()) / 60)
        head = words["head"].format(minutes=minutes, hardware=words["hardware"], seeds=len(runs), title=f"`{config}`")
        lines += [head, "| --- | --- |"]
        for name, title in words["rows"].items():
            if name not in result["summary"]:
                continue
            value, classes = result["summary"][name], next(iter(runs.values()))["classes"]
            unit = "" if name == "cider" else " %"
            span = f"{100 * value['min']:.1f} – {100 * value['max']:.1f}"
            title = title.format(classes=f"{classes:,}" if classes else "")
            lines.append(f"| {title} | {100 * value['mean']:.1f}{unit} ({span}) |")
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
    step = json.loads((ROOT / "benchmarks/blip_step.json").read_text())
    caption = json.loads((ROOT / "benchmarks/blip_generate.json").read_text())
    lines += [
        "",
        words["blip"].format(
            size=step["image_size"],
            batch=step["batch"],
            rounds=len(step["seconds"]["vlp"]),
            ours=statistics.median(step["seconds"]["vlp"]),
            theirs=statistics.median(step["seconds"]["LAVIS"]),
            ratio=step["ratio_of_medians"],
            caption_size=caption["image_size"],
            caption_batch=caption["batch"],
            beams=caption["beams"],
            tokens=caption["tokens"],
            caption_ours=caption["medians"]["vlp"]["whole"],
            caption_theirs=caption["medians"]["transformers"]["whole"],
            caption_ratio=caption["ratio_whole"],
            outside=caption["ratio_outside_vision"],
        ),
    ]
    writing = json.loads((ROOT / "benchmarks/blip2_generate.json").read_text())
    features = json.loads((ROOT / "benchmarks/blip2_features.json").read_text())
    lines += [
        "",
        words["blip2"].format(
            llm=writing["language_model"].upper(),
            batch=writing["batch"],
            beams=writing["beams"],
            tokens=writing["tokens"],
            rounds=len(writing["seconds"]["vlp"]),
            ours=writing["medians"]["vlp"],
            theirs=writing["medians"]["transformers"],
            ratio=writing["ratio"],
            features=features["ratio_of_features"],
            step=features["ratio_of_steps"],
        ),
    ]
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
