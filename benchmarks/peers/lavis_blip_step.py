"""One BLIP pre-training step of LAVIS (the pip-installable original) at BLIP-base size on random weights.

usage: python lavis_blip_step.py IMAGE_SIZE BATCH THREADS

Runs a step for each line on stdin, and prints its seconds. Needs a separate environment, because LAVIS needs old libraries
(see ../blip_step.py). The captions are the token ids of `caption_ids` (6 to 15 tokens, padded to LAVIS' fixed 30), which
blip_step.py imports to use the same batch.
"""

import collections.abc
import importlib.util
import sys
import time
import types

import torch
from torch import nn


def caption_ids(batch, pad_to=30, seed=0):
    """(batch, pad_to) token ids and mask: [CLS] 4 to 13 word ids [SEP] [PAD]*, the lengths of common web captions."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.zeros(batch, pad_to, dtype=torch.long)
    for row in ids:
        n = int(torch.randint(6, 16, (1,), generator=g))
        row[:n] = torch.randint(1996, 28000, (n,), generator=g)
        row[0], row[n - 1] = 101, 102
    return ids, (ids != 0).long()


def load_lavis():
    """Import LAVIS' BlipPretrain without the rest of LAVIS (its package import needs some forty other packages)."""

    def module(name, **attributes):
        m = sys.modules[name] = types.ModuleType(name)
        m.__dict__.update(attributes)
        return m

    root = importlib.util.find_spec("lavis").submodule_search_locations[0]
    module("torch._six", container_abcs=collections.abc, string_classes=(str,), int_classes=int)
    for name in ("lavis", "lavis.models", "lavis.common"):
        module(name).__path__ = [root + "/" + "/".join(name.split(".")[1:])]
    module("lavis.common.registry", registry=types.SimpleNamespace(register_model=lambda name: lambda cls: cls))
    module("lavis.common.dist_utils", download_cached_file=None, is_dist_avail_and_initialized=lambda: False)
    module("lavis.common.utils", get_abs_path=None, is_url=None)

    class Distilled:
        def copy_params(self):
            for student, teacher in self.model_pairs:
                for p, m in zip(student.parameters(), teacher.parameters()):
                    m.data.copy_(p.data)
                    m.requires_grad = False

        @torch.no_grad()
        def _momentum_update(self):
            for student, teacher in self.model_pairs:
                for p, m in zip(student.parameters(), teacher.parameters()):
                    m.data = m.data * self.momentum + p.data * (1.0 - self.momentum)

    class Queue:
        @torch.no_grad()
        def _dequeue_and_enqueue(self, image_feats, text_feats, idxs=None):
            n, at = image_feats.shape[0], int(self.queue_ptr)
            self.image_queue[:, at : at + n], self.text_queue[:, at : at + n] = image_feats.T, text_feats.T
            self.queue_ptr[0] = (at + n) % self.queue_size

    class Base(nn.Module):
        @property
        def device(self):
            return next(self.parameters()).device

    module(
        "lavis.models.base_model",
        BaseModel=Base,
        BaseEncoder=Base,
        MomentumDistilationMixin=Distilled,
        SharedQueueMixin=Queue,
        all_gather_with_grad=lambda t: t,
        concat_all_gather=lambda t: t,
    )
    import lavis.models.blip_models.blip_pretrain as blip

    return blip


def build(image_size):
    blip = load_lavis()
    from lavis.models.med import BertConfig, XBertEncoder, XBertLMHeadDecoder
    from lavis.models.vit import VisionTransformerEncoder

    class Tokenizer:
        pad_token_id, bos_token_id, enc_token_id = 0, 30522, 30523

        def __len__(self):
            return 30524

        def __call__(self, text, **kw):
            encoding = types.SimpleNamespace(input_ids=text[0], attention_mask=text[1])
            encoding.to = lambda device: encoding
            return encoding

    blip.BlipBase.init_tokenizer = classmethod(lambda cls: Tokenizer())
    text = dict(vocab_size=30524, encoder_width=768, add_cross_attention=True, add_type_embeddings=False)
    vision = VisionTransformerEncoder(img_size=image_size, patch_size=16, embed_dim=768, depth=12, num_heads=12)
    vision.vision_width = 768
    return blip.BlipPretrain(
        vision,
        XBertEncoder(BertConfig(**text), add_pooling_layer=False),
        XBertLMHeadDecoder(BertConfig(**text)),
        queue_size=4096,
    )


if __name__ == "__main__":
    size, batch, threads = (int(x) for x in sys.argv[1:])
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = build(size).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, weight_decay=0.05)
    sample = dict(
        image=torch.randn(batch, 3, size, size), text_input=caption_ids(batch), epoch=2, iters=0, num_iters_per_epoch=1
    )
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        out = model(sample)
        (out.loss_itc + out.loss_itm + out.loss_lm).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(time.perf_counter() - start, flush=True)
