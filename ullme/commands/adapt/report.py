"""nDCG@10 of what was found for test queries, with bootstrap intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np


def read_found(file: str | Path) -> dict[str, list[str]]:
    """Query id -> document ids, of a .jsonl file of ``ullme search``."""
    lines = Path(file).read_bytes().splitlines()  # of a text, U+2028 and others in a document would end a line
    return {row["query"]: [hit["id"] for hit in row["hits"]] for row in map(json.loads, lines)}


def table(scores: Mapping[str, Mapping[str, float]], differences: Sequence[tuple[str, str]]) -> str:
    """Means and differences in points, each with the 95 % interval of a paired bootstrap over queries.

    Args:
        scores: name of a system -> query id -> score, all of the same queries.
        differences: pairs of names, whose first is compared with the second.
    """
    queries = list(next(iter(scores.values())))
    points = {name: 100 * np.array([own[query] for query in queries]) for name, own in scores.items()}
    width = max(len(name) for name in (*scores, *(f"{a} - {b}" for a, b in differences)))
    lines = [f"nDCG@10 of {len(queries)} queries"]
    lines += [f"{name:<{width}} {values.mean():6.1f} {_interval(values, '.1f')}" for name, values in points.items()]
    for first, second in differences:
        values = points[first] - points[second]
        lines.append(f"{f'{first} - {second}':<{width}} {values.mean():+6.1f} {_interval(values, '+.1f')}")
    return "\n".join(lines)


def _interval(values: np.ndarray, form: str) -> str:
    from ullme.commands.reproduce.statistics import paired_bootstrap

    if len(values) < 2:
        return ""
    (low, high), _ = paired_bootstrap(values)
    return f"[{low:{form}}, {high:{form}}]"
