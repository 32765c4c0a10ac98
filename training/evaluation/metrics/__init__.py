"""Metrics of `evaluate`, one file each, that load with no network: `load("recall_at_k")`, or by their path.

Each takes `resamples` and `seed`, and then gives a 95 % bootstrap interval beside every value.
"""

import io
from contextlib import redirect_stderr
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def describe(description: str, arguments: str, predictions, references):
    """What `evaluate` asks of a metric: what it is, how to call it, and the features of its inputs."""
    import datasets
    import evaluate

    features = datasets.Features({"predictions": predictions, "references": references})
    return evaluate.MetricInfo(description=description, citation="", inputs_description=arguments, features=features)


def load(name: str, **options):
    """One of NAMES as an `evaluate.Metric`. Raises ValueError for another name."""
    import evaluate

    if name not in NAMES:
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(NAMES)}.")
    with redirect_stderr(io.StringIO()):  # what it says of its cache
        return evaluate.load(str(FOLDER / f"{name}.py"), keep_in_memory=True, **options)
