"""Scores of a teacher for training rows, which a distillation loss then reads.

    python benchmarks/teacher_scores.py --teacher MODEL --rows train.jsonl --output scored.jsonl [--max_rows N]

``--teacher`` is a sentence-transformers model (a folder or a name on the hub); ``--rows`` has ``query``, ``pos`` and
``neg``. Each row is written again with ``pos_scores`` and ``neg_scores``: the cosines of the query with its passages.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", required=True, help="sentence-transformers model: a folder or a name on the hub")
    parser.add_argument("--rows", type=Path, required=True, help="JSONL file of query, pos, neg")
    parser.add_argument("--output", type=Path, required=True, help="JSONL file of the rows with scores")
    parser.add_argument("--max_rows", type=int, help="only the first rows")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_length", type=int, help="tokens of a text (default: the teacher's)")
    return parser.parse_args()


def scored(teacher: Any, rows: list[dict[str, Any]], batch_size: int) -> list[dict[str, Any]]:
    """Each text is embedded once, whichever rows it is in."""
    texts = list(dict.fromkeys(text for row in rows for text in (row["query"], *row["pos"], *row["neg"])))
    vectors = teacher.encode(texts, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)
    place = {text: n for n, text in enumerate(texts)}
    found = []
    for row in rows:
        query = vectors[place[row["query"]]]
        scores = {
            name: [round(float(vectors[place[text]] @ query), 6) for text in row[side]]
            for name, side in (("pos_scores", "pos"), ("neg_scores", "neg"))
        }
        found.append({**row, **scores})
    return found


def main() -> None:
    from sentence_transformers import SentenceTransformer

    options = parse()
    lines = options.rows.read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line.strip()][: options.max_rows]
    teacher = SentenceTransformer(options.teacher)
    if options.max_length:
        teacher.max_seq_length = options.max_length
    found = scored(teacher, rows, options.batch_size)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(text, encoding="utf-8")
    agree = sum(min(row["pos_scores"]) > max(row["neg_scores"]) for row in found if row["pos"] and row["neg"])
    print(f"{len(found)} rows; the teacher ranks the positive first in {agree}")


if __name__ == "__main__":
    main()
