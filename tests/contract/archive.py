"""Runs the common tests of transformers on the classes of vlp: `make test-transformers`.

The tests come from transformers' source archive, whose folder the environment variable VLP_TRANSFORMERS names; without
it, nothing is collected here (see conftest.py). The archive has no tests of `generate`; they run too if TF_TESTS names
the folder `tests` of a copy of transformers' repository. The files are imported as the package `tests`, as there.
"""

import os
import sys
import types
from pathlib import Path

folders = [Path(os.environ["VLP_TRANSFORMERS"]) / "tests"]
folders += [Path(os.environ["TF_TESTS"])] if os.environ.get("TF_TESTS") else []
(folders[0] / "__init__.py").touch()  # the archive lacks it, and a test reads it
package = types.ModuleType("tests")
package.__path__ = [str(folder) for folder in folders]
sys.modules["tests"] = package


def stand_in(name: str, **content) -> None:
    """Provide a module that the archive lacks."""
    sys.modules[name] = types.SimpleNamespace(**content)


stand_in("fetch_hub_objects_for_ci", url_to_local_path=lambda url: url)
stand_in("tests.utils.test_configuration_utils", config_common_kwargs={})
stand_in(
    "tests.exporters.test_export",
    **{name: type(name, (), {}) for name in ("ExportTesterMixin", "ExportGenerateTesterMixin")},
)
if len(folders) == 1:
    stand_in("tests.generation.test_utils", GenerationTesterMixin=type("GenerationTesterMixin", (), {}))
