"""How the benchmarks here report."""

from __future__ import annotations

import json
from typing import Any

from cluster.bench.stamp import stamp


def report(result: dict[str, Any]) -> None:
    """Prints the result with its stamp as JSON."""
    print(json.dumps(stamp() | result, indent=2))
