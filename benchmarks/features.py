"""Which features vlp and other libraries have, found by running each of them.

    python benchmarks/features.py [--libraries vlp open_clip ...]

For each feature and library, PROBES has a short program that uses the library's own entry point on tiny random models; it
must end without an error. A library without a program for a feature has no entry point for it in the version that was
looked at. The results are written to features.json, from which `make readme` renders the table of the README.

open_clip, transformers and sentence-transformers are those installed beside vlp (`pip install sentence-transformers`).
LAVIS needs .venv-lavis: see blip_step.py; its BLIP-2 downloads its towers, so only its classes are looked for. A library
that is not installed keeps its stored results.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

RESULTS = Path(__file__).with_suffix(".json")
LAVIS = Path(__file__).parents[1] / ".venv-lavis" / "bin" / "python"
VERSIONS = {"vlp": "vlp", "open_clip": "open_clip_torch", "LAVIS": "salesforce-lavis", "transformers": "transformers",
            "sentence-transformers": "sentence-transformers"}  # fmt: skip
TRAIN = '''
import sys
from vlp.training.run import main
sys.argv = ["training", *"""{} --max_train_minutes none --max_train_steps 2 --eval_split none --report_to none --num_threads 2
    --per_device_train_batch_size 16 --output_dir out""".split()]
main()
'''
CLIP = "clip --config clip-emoji-vit"
OPEN_CLIP = '''
import sys
from open_clip_train.main import main
main("""--dataset-type synthetic --train-num-samples 8 --batch-size 4 --epochs 1 --warmup 1 --workers 0 --model ViT-S-32-alt
    --logs logs --zeroshot-frequency 0 {}""".split())
'''
TINY = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
TRANSFORMERS = f"import torch\nfrom transformers import *\ntiny = {TINY}\n"
BLIP2 = """
vision = dict(tiny, image_size=32, patch_size=16)
queries = dict(tiny, vocab_size=99, encoder_hidden_size=32, cross_attention_frequency=1)
text = OPTConfig(vocab_size=99, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2,
    max_position_embeddings=64, word_embed_proj_dim=32)
config = {0}Config(vision_config=vision, qformer_config=queries, text_config=text, num_query_tokens=4, image_token_index=98)
model = {0}ForConditionalGeneration(config)
ids = torch.tensor([[98, 98, 98, 98, 5, 6, 7]])
model(pixel_values=torch.randn(1, 3, 32, 32), input_ids=ids, labels=ids, **{1}).loss.backward()
"""
ST = """
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses, modules
class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(99, 32)
    def forward(self, features):
        return features | {"sentence_embedding": self.words(features["input_ids"]).mean(dim=1)}
    def get_sentence_embedding_dimension(self): return 32
    def get_embedding_dimension(self): return 32
    def tokenize(self, texts, **options): return {"input_ids": torch.tensor([[len(text) % 99, 5] for text in texts])}
    preprocess = tokenize
    def save(self, *args, **options): pass
model = SentenceTransformer(modules=[Tiny()], device="cpu")
features = [model.tokenize(["a", "bb", "ccc"]), model.tokenize(["d", "ee", "fff"])]
"""
LAVIS_CLASS = """
import ast, importlib.util, pathlib
root = pathlib.Path(importlib.util.find_spec("lavis").submodule_search_locations[0])
tree = ast.parse((root / "models/{}.py").read_text())
assert any(isinstance(node, ast.ClassDef) and node.name == "{}" for node in tree.body)
"""

# For each feature: what the README calls it, in English and in Vietnamese, and the program of each library.
PROBES: list[tuple[str, str, dict[str, str]]] = [
    ("training of CLIP", "huấn luyện CLIP", {
        "vlp": TRAIN.format(CLIP), "open_clip": OPEN_CLIP.format(""),
        "transformers": TRANSFORMERS + "model = CLIPModel(CLIPConfig(vision_config=dict(tiny, image_size=32), "
                        "text_config=dict(tiny, vocab_size=99, eos_token_id=98)))\n"
                        "row = {'input_ids': torch.tensor([1, 98]), 'pixel_values': torch.randn(3, 32, 32), "
                        "'return_loss': True}\n"
                        "collate = lambda rows: {name: torch.stack([row[name] for row in rows]) for name in ('input_ids', "
                        "'pixel_values')} | {'return_loss': True}\n"
                        "Trainer(model, TrainingArguments('out', max_steps=1, use_cpu=True, report_to='none', "
                        "remove_unused_columns=False), collate, [row] * 8).train()",
        "sentence-transformers": ST + "losses.MultipleNegativesRankingLoss(model)(features, None).backward()",
    }),
    ("the sigmoid loss of SigLIP", "hàm mất mát sigmoid của SigLIP", {
        "vlp": TRAIN.format(f"{CLIP} --loss sigmoid"), "open_clip": OPEN_CLIP.format("--siglip"),
        "transformers": TRANSFORMERS + "model = SiglipModel(SiglipConfig(vision_config=dict(tiny, image_size=32), "
                        "text_config=dict(tiny, vocab_size=99, projection_size=32)))\n"
                        "model(input_ids=torch.ones(2, 64).long(), pixel_values=torch.randn(2, 3, 32, 32), "
                        "return_loss=True).loss.backward()",
    }),
    ("towers of transformers or timm in a CLIP", "tháp của transformers hay timm trong CLIP", {
        "vlp": "import vlp\nvlp.VlpClipModel(vlp.VlpClipConfig(vision_config={'model_type': 'vlp_vision_tower', 'tower': "
               "{'model_type': 'dinov2'}}, text_config={'model_type': 'vlp_text_tower', 'tower': {'model_type': 'bert'}}))",
        "open_clip": "import open_clip\nopen_clip.create_model('vit_medium_patch16_gap_256')",
        "transformers": TRANSFORMERS + "VisionTextDualEncoderModel(VisionTextDualEncoderConfig.from_vision_text_configs("
                        "ViTConfig(**tiny), BertConfig(**tiny)))",
    }),
    ("images of variable shape (NaFlex), trained", "ảnh có hình dạng bất kỳ (NaFlex), khi huấn luyện", {
        "vlp": TRAIN.format(f"{CLIP} --max_num_patches 64 --augmentation crop --no-cache_images"),
        "transformers": TRANSFORMERS + "model = Siglip2Model(Siglip2Config(vision_config=dict(tiny, num_patches=16), "
                        "text_config=dict(tiny, vocab_size=99, projection_size=32)))\n"
                        "model(input_ids=torch.ones(2, 64).long(), pixel_values=torch.randn(2, 6, 768), "
                        "pixel_attention_mask=torch.ones(2, 6), spatial_shapes=torch.tensor([[2, 3], [1, 6]]), "
                        "return_loss=True).loss.backward()",
    }),
    ("distillation from a teacher", "chưng cất từ mô hình thầy", {
        "vlp": TRAIN.format(f"{CLIP} --teacher_name_or_path {{cards}}/clip-emoji"),
        "open_clip": "import torch, open_clip\nx = torch.eye(4)\n"
                     "open_clip.loss.DistillClipLoss()(x, x, torch.tensor(1.0), x, x, torch.tensor(1.0))",
        "sentence-transformers": ST + "losses.DistillKLDivLoss(model)([*features, features[0]], "
                                 "torch.randn(3, 2)).backward()",
    }),
    ("Matryoshka embeddings", "embedding Matryoshka", {
        "vlp": TRAIN.format(f"{CLIP} --embedding_sizes 64,128"),
        "sentence-transformers": ST + "loss = losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), "
                                 "[16, 32])\nloss(features, None).backward()",
    }),
    ("the gradient of a large batch in the memory of a small one", "gradient của lô lớn trong bộ nhớ của lô nhỏ", {
        "vlp": TRAIN.format(f"{CLIP} --micro_batch_size 4"), "open_clip": OPEN_CLIP.format("--accum-freq 2"),
        "sentence-transformers": ST + "losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)(features, "
                                 "None).backward()",
    }),
    ("pre-training of BLIP: ITC with a momentum teacher and a queue, ITM, LM",
     "tiền huấn luyện BLIP: ITC với mô hình thầy theo động lượng và hàng đợi, ITM, LM", {
        "vlp": TRAIN.format("blip"),
        "LAVIS": "import subprocess, sys\nsubprocess.run([sys.executable, '{peers}/lavis_blip_step.py', '224', '2', '1'], "
                 "input='step\\n', text=True, check=True)",
    }),
    ("BLIP-2, stage 1", "BLIP-2, giai đoạn một", {
        "vlp": TRAIN.format("blip2 --vision_tower {cards}/blip-emoji --bert_name_or_path {cards}/blip-emoji"),
        "LAVIS": LAVIS_CLASS.format("blip2_models/blip2_qformer", "Blip2Qformer"),
    }),
    ("BLIP-2, stage 2", "BLIP-2, giai đoạn hai", {
        "vlp": "import torch, vlp\nfrom transformers import LlamaConfig\n"
               f"tiny = {TINY}\nmodel = vlp.VlpBlip2ForConditionalGeneration(vlp.VlpBlip2Config(vision_config=dict(tiny, "
               "image_size=32, patch_size=16), qformer_config=dict(tiny, vocab_size=99, bos_token_id=97, eos_token_id=98), "
               "text_config=LlamaConfig(**tiny, vocab_size=99, num_key_value_heads=2), store_language_model=True))\n"
               "ids = torch.tensor([[5, 6, 7]])\n"
               "model(pixel_values=torch.randn(1, 3, 32, 32), input_ids=ids, labels=ids).loss.backward()",
        "LAVIS": LAVIS_CLASS.format("blip2_models/blip2_opt", "Blip2OPT"),
        "transformers": TRANSFORMERS + BLIP2.format("Blip2", "{}"),
    }),
    ("CapFilt: caption and filter web data", "CapFilt: viết và lọc chú thích cho dữ liệu web", {
        "vlp": "import sys\nfrom vlp.training.run import main\nsys.argv = ['training', 'capfilt', '--help']\n"
               "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code",
    }),
    ("linear probes and few-shot classification", "linear probe và phân loại few-shot", {
        "vlp": "import sys\nfrom vlp.training.evaluate import main\nsys.argv = ['evaluate', '{cards}/clip-emoji', '--dataset', "
               "'emoji', '--task', 'few-shot', '--class_column', 'group', '--shots', '1', '--output_dir', 'out']\nmain()",
    }),
    ("zero-shot evaluation with prompts", "đánh giá zero-shot với prompt", {
        "vlp": "import sys\nfrom vlp.training.evaluate import main\nsys.argv = ['evaluate', '{cards}/clip-emoji', '--dataset', "
               "'emoji', '--task', 'zero-shot', '--output_dir', 'out']\nmain()",
        "open_clip": "import torch, open_clip\nmodel = open_clip.create_model('ViT-S-32-alt')\n"
                     "open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer('ViT-S-32-alt'), ['a', 'b'], "
                     "[lambda name: name])",
        "transformers": "from transformers import pipeline\n"
                        "from transformers.pipelines import ZeroShotImageClassificationPipeline",
    }),
    ("averaged weights (WiSE-FT, soups)", "lấy trung bình trọng số (WiSE-FT, soup)", {
        "vlp": "import sys\nfrom vlp.commands.merge import main\nsys.argv = ['merge', '{cards}/clip-emoji', "
               "'{cards}/clip-emoji', '--weights', '0.5', '--output_dir', 'out']\nmain()",
    }),
    ("LoRA adapters", "adapter LoRA", {
        "vlp": TRAIN.format("clip --model_name_or_path {cards}/clip-emoji --lora_rank 4"),
        "transformers": TRANSFORMERS + "from peft import LoraConfig\n"
                        "CLIPModel(CLIPConfig(vision_config=tiny, text_config=tiny)).add_adapter("
                        "LoraConfig(target_modules=['q_proj']))",
        "sentence-transformers": "from sentence_transformers import SentenceTransformer\nSentenceTransformer.add_adapter",
    }),
    ("an index for search, on disk", "chỉ mục tìm kiếm, trên đĩa", {
        "vlp": "import shutil, sys\nfrom vlp.commands.index import main\nfrom PIL import Image\nimport os\n"
               "os.mkdir('pictures')\nImage.new('RGB', (9, 9)).save('pictures/a.png')\n"
               "sys.argv = ['index', 'build', 'pictures', 'out', '--model', '{cards}/clip-emoji']\nmain()",
    }),
    ("a model card with each run", "thẻ mô hình sau mỗi lần huấn luyện", {
        "vlp": TRAIN.format(CLIP) + "assert open('out/README.md').read().startswith('---')",
        "transformers": "from transformers import Trainer\nTrainer.create_model_card",
        "sentence-transformers": ST + "assert model.model_card_data is not None",
    }),
]  # fmt: skip


def python_of(library: str) -> str:
    return str(LAVIS) if library == "LAVIS" else sys.executable


def version_of(library: str) -> str | None:
    """The installed version of a library; None if it is not installed."""
    code = f"from importlib.metadata import version; print(version({VERSIONS[library]!r}))"
    try:
        found = subprocess.run([python_of(library), "-c", code], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def runs(library: str, program: str) -> str | None:
    """Run a program of a library; returns None if it ended without an error, else the last line of what it said."""
    cards = Path(__file__).parents[1] / "model_cards"
    with tempfile.TemporaryDirectory() as folder:
        program = program.replace("{cards}", str(cards)).replace("{peers}", str(Path(__file__).parent / "peers"))
        found = subprocess.run([python_of(library), "-c", program], capture_output=True, text=True, cwd=folder)
    return None if found.returncode == 0 else (found.stderr.strip().splitlines() or ["no message"])[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--libraries", nargs="+", default=list(VERSIONS), choices=list(VERSIONS))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for library in parser.parse_args().libraries:
        version = version_of(library)
        if version is None:
            print(f"{library} is not installed; its stored results are kept.")
            continue
        found = {}
        for english, _, programs in PROBES:
            error = runs(library, programs[library]) if library in programs else "no entry point"
            found[english] = error is None
            print(f"{library}: {english}: {error or 'yes'}", flush=True)
        results[library] = {"version": version, "features": found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
