"""The table in docs/towers.md: which start works in which use. Each entry is what a run of the use gave.

`VLP_WRITE_TABLE=1 make test-all ARGS="-k towers_table"` writes the table anew.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_bundle import run_without_vlp
from test_towers import CAPTIONS, IMAGES, TEXTS, check_uses, image_folder, joined, text_folder
from torch.testing import assert_close
from transformers import AutoModel
from vlp.modeling_vlp.exchange.bundle import add_code
from vlp.modeling_vlp.exchange.places import ExchangeError
from vlp.training.machine.adapters import TARGETS

from vlp.commands.index import build
from vlp.commands.onnx import export
from vlp.conversion import convert
from vlp.towers import text_start, vision_start

PAGE = Path(__file__).parents[2] / "docs/towers.md"
BEGIN, END = "<!-- table of starts: made by tests/vlp/test_towers_table.py -->\n", "<!-- end of the table -->\n"


def loaded_and_classified(model, processor, folder: Path, part: str) -> None:
    check_uses(model, processor, folder)


def indexed(model, processor, folder: Path, part: str) -> None:
    (folder / "pictures").mkdir()
    (folder / "pictures" / "red.png").write_bytes(Path(PAGE.parent / "clip-emoji-loss.png").read_bytes())
    assert not build(folder / "pictures", folder / "index", str(folder / "clip"))


def adapted(model, processor, folder: Path, part: str) -> None:
    from peft import LoraConfig

    copy = AutoModel.from_pretrained(folder / "clip")
    copy.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
    names = [name for name, _ in copy.named_parameters() if "lora_A" in name]
    if not any(name.startswith(part) for name in names):
        raise NotImplementedError("a tower without attention")


def exported_to_onnx(model, processor, folder: Path, part: str) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    files = export(AutoModel.from_pretrained(folder / "clip"), processor, folder / "exported", quantized=False) / "onnx"
    side = model.config.vision_config.image_size
    tokens, pixels = processor.tokenize(CAPTIONS, 20)["input_ids"], torch.randn(3, 3, side, side)
    with torch.no_grad():
        cases = {"vision_model": (pixels, "pixel_values", model.get_image_features(pixels).pooler_output),
                 "text_model": (tokens, "input_ids", model.get_text_features(tokens).pooler_output)}  # fmt: skip
    for name, (value, given, expected) in cases.items():
        session = onnxruntime.InferenceSession(files / f"{name}.onnx")
        found = torch.tensor(session.run(None, {given: value.numpy()})[0])
        assert_close(found, expected, rtol=1e-3, atol=1e-4)


def bundled(model, processor, folder: Path, part: str) -> None:
    add_code(folder / "clip")
    run_without_vlp(folder / "clip", folder)


def exported_to_transformers(model, processor, folder: Path, part: str) -> None:
    try:
        convert(folder / "clip", folder / "theirs", to="transformers")
    except ExchangeError as error:
        raise NotImplementedError(str(error)) from error


USES: dict[str, Callable] = {
    "Auto classes, pipeline": loaded_and_classified,
    "index": indexed,
    "LoRA": adapted,
    "ONNX": exported_to_onnx,
    "bundle": bundled,
    "`--to transformers`": exported_to_transformers,
}
WHY = {"a tower without attention": "no attention", "has no hidden_size": "not by that class",
       "the pooling": "pooling of its own"}  # fmt: skip


def row_of(kind: str, folder: Path) -> str:
    """A row of the table: the start, and for each use whether it works."""
    if kind in IMAGES:
        image_folder(kind, folder / "source"), text_folder("bert", folder / "text")
        start, words = vision_start(str(folder / "source"), ""), text_start(str(folder / "text"), "", "pooler")
    else:
        image_folder("dinov2", folder / "text"), text_folder(kind, folder / "source")
        start, words = vision_start(str(folder / "text"), "", "pooler"), text_start(str(folder / "source"), "")
    model, processor = joined(start, words)
    cells, part = [], "vision_model" if kind in IMAGES else "text_model"
    for use in USES.values():
        try:
            use(model, processor, folder, part)
            cells.append("yes")
        except NotImplementedError as error:
            cells.append(next(short for reason, short in WHY.items() if reason in str(error)))
    return f"| `{kind}` ({'image' if kind in IMAGES else 'text'}) | {' | '.join(cells)} |"


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_table_says_what_works(tmp_path, monkeypatch):
    monkeypatch.setenv("VLP_CACHE", str(tmp_path / "cache"))
    pytest.importorskip("timm")
    lines = [f"| start | {' | '.join(USES)} |", f"|{' --- |' * (len(USES) + 1)}"]
    for kind in [*IMAGES, *TEXTS]:
        lines.append(row_of(kind, tmp_path / kind))
        print(lines[-1], flush=True)
    text, table = PAGE.read_text(), "\n".join(lines) + "\n"
    if os.environ.get("VLP_WRITE_TABLE"):
        PAGE.write_text(re.sub(f"{BEGIN}.*?{END}", lambda match: f"{BEGIN}{table}{END}", text, flags=re.DOTALL))
    assert table in PAGE.read_text()
