"""Measure the time of a text query over a million vectors, and its recall of the exact answer.

    python benchmarks/index_search.py [--vectors 1000000] [--rounds 5]

The vectors are the embeddings of the 8,810 bundled drawings by model_cards/clip-emoji, mapped to 512 dimensions and
repeated with noise until there are a million. The queries are text embeddings by the same model, mapped in the same
way. The index is compared with exhaustive search by torch (float32) and by faiss; the queries of all ways
are interleaved.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from datasets.utils.py_utils import iter_batched
from torch.nn import functional as F
from vlp.processing.pictures import read_picture
from vlp.training.data.sources import load_rows

from vlp.commands.index import PROBES, Index, save
from vlp.inference import load

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).with_suffix(".json")
WIDTH, TOP_K, QUERIES = 512, 10, 50


def real_vectors() -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of all drawings (8810, E), and of some of their names (QUERIES, E)."""
    predictor, rows = load(ROOT / "model_cards/clip-emoji", "embed"), []
    for split in ("train", "test"):
        rows += list(load_rows("emoji", split, "image"))
    images = (read_picture(row["image"]) for row in rows)
    embeds = torch.cat([predictor.embed_images(chunk) for chunk in iter_batched(images, 64)])
    names = [row["caption"] for row in rows[:: len(rows) // QUERIES]][:QUERIES]
    return embeds, predictor.embed_texts(names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vectors", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import faiss

    torch.manual_seed(0)
    embeds, queries = real_vectors()
    turn = torch.linalg.qr(torch.randn(WIDTH, embeds.shape[1]))[0].T  # (E, WIDTH), preserves lengths
    near = (embeds @ turn)[torch.randint(len(embeds), (options.vectors,))]
    vectors = F.normalize(near + 0.5 * WIDTH**-0.5 * torch.randn_like(near), dim=1)
    queries = queries @ turn
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        save(Path(place) / "index", [(str(n), 0, 0) for n in range(len(vectors))], vectors, "", Path(place), None)
        built = time.perf_counter() - start
        size = sum(path.stat().st_size for path in (Path(place) / "index").iterdir())
        index = Index(Path(place) / "index")
        flat = faiss.IndexFlatIP(WIDTH)
        flat.add(vectors.numpy())
        ways = {
            "vlp index": lambda query: {int(hit.path) for hit in index.search(query, TOP_K)},
            "vlp index, every cell": lambda query: {int(hit.path) for hit in index.search(query, TOP_K, probes=0)},
            "torch, every vector, float32": lambda query: set((vectors @ query).topk(TOP_K).indices.tolist()),
            "faiss, every vector": lambda query: set(flat.search(query[None].numpy(), TOP_K)[1][0].tolist()),
        }
        exact = [set((vectors @ query).topk(TOP_K).indices.tolist()) for query in queries]
        times: dict[str, list[float]] = {name: [] for name in ways}
        right = dict.fromkeys(ways, 0)
        for way in ways.values():
            way(queries[0])
        for round_ in range(options.rounds):
            for number in range(round_, len(queries), options.rounds):
                for name, way in ways.items():
                    start = time.perf_counter()
                    found = way(queries[number])
                    times[name].append(1000 * (time.perf_counter() - start))
                    right[name] += len(found & exact[number])
    result = {
        "vectors": options.vectors, "width": WIDTH, "probes": PROBES, "threads": torch.get_num_threads(),
        "queries": len(queries), "build_seconds": round(built, 1), "megabytes": round(size / 1e6),
        "ways": {
            name: {
                "median_ms": round(statistics.median(values), 1),
                "range_ms": [round(min(values), 1), round(max(values), 1)],
                "recall_at_10": round(right[name] / (TOP_K * len(queries)), 4),
            }
            for name, values in times.items()
        },
    }  # fmt: skip
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
