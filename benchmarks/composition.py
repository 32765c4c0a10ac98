"""Compare models on captions with swapped words: `evaluate --task composition` on the scenes of the test split.

    python benchmarks/composition.py runs/clip-scenes model_cards/blip-scenes

runs/clip-scenes is a CLIP that was trained on the same scenes:

    accelerate launch training clip --dataset_name scenes --eval_split none --image_size 64 --max_length 24 \\
        --augmentation none --cache_images --per_device_train_batch_size 128 --num_threads 1 \\
        --output_dir runs/clip-scenes

Each model scores a true caption and a false one of the same words. The results are written to composition.json.
"""

import argparse
import json
from pathlib import Path

from vlp.training.evaluate import evaluate
from vlp.training.evaluation.arguments import EvaluationArguments

RESULTS = Path(__file__).with_suffix(".json")


def composition(model: str) -> dict:
    """How often a model, a folder or a hub name, puts the true caption above the false one; see `evaluate`."""
    arguments = EvaluationArguments(
        dataset="scenes", dataset_config_name="swaps", split="test", task="composition", group_column="kind"
    )
    return evaluate(model, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="folders of models, or hub names")
    results = {}
    for model in parser.parse_args().models:
        found = composition(model)
        results[Path(model).name] = {
            name: found[name] for name in ("architecture", "metrics", "intervals", "groups", "rows")
        }
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
