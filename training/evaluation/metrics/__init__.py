"""Metrics for `evaluate`, one file each, which load without a network: `load("recall_at_k")`, or by their path.

With `resamples` and `seed`, each metric also returns a 95 % bootstrap interval for every value.
"""

import io
from contextlib import redirect_stderr
from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


def describe(description: str, arguments: str, predictions, references):
    """Build the MetricInfo that `evaluate` requires of a metric.

    Args:
        description: what the metric measures.
        arguments: its arguments and return values.
        predictions: the `datasets` feature of a prediction.
        references: the `datasets` feature of a reference.
    """
    import datasets
    import evaluate

    features = datasets.Features({"predictions": predictions, "references": references})
    return evaluate.MetricInfo(description=description, citation="", inputs_description=arguments, features=features)


def load(name: str, **options):
    """Load a metric.

    Args:
        name: one of NAMES.
        options: passed to `evaluate.load`.

    Returns:
        An `evaluate.Metric`.

    Raises:
        ValueError: if there is no metric of this name.
    """
    import evaluate

    if name not in NAMES:
        raise ValueError(f"There is no metric {name!r}; the metrics are {', '.join(NAMES)}.")
    with redirect_stderr(io.StringIO()):  # a message about its cache
        return evaluate.load(str(FOLDER / f"{name}.py"), keep_in_memory=True, **options)
