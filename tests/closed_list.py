"""The closed list of reasons for which a site may be kept, from the coverage sweep."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
RESULT = _BENCHMARKS / "results" / "coverage.json"


def _loaded() -> ModuleType:
    name = "coverage_reasons"
    spec = importlib.util.spec_from_file_location(name, _BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


reason_of = _loaded().reason_of
