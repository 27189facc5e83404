r"""A dataset of your own columns: questions with a list of graded answers.

python train.py fit --config configs/base.yaml --config configs/model/phi-1.5.yaml \
  --data.train answers.jsonl --data.schema my_dataset.graded --data.num_hard_negatives 1

A row: {"question": "who founded the town?", "language": "English",
        "answers": [{"text": "Ada did.", "grade": 2}, {"text": "It has a mill.", "grade": 0}]}
"""

from __future__ import annotations

from typing import Any

from ullme.data.records import BadRow, Record


def graded(row: dict[str, Any]) -> Record:
    """Answers of grade 2 are positives, those of grade 0 hard negatives; grade 1 is neither.

    Texts are stripped, repeated ones dropped and empty ones refused afterwards, as for every other schema. What this
    raises is reported with the row's file and line.
    """
    by_grade: dict[int, list[str]] = {0: [], 1: [], 2: []}
    for answer in row["answers"]:
        if answer["grade"] not in by_grade:
            raise BadRow(f"grade {answer['grade']!r} is not 0, 1 or 2")
        by_grade[answer["grade"]].append(answer["text"])
    return Record(
        query=row["question"],
        positives=tuple(by_grade[2]),
        negatives=tuple(by_grade[0]),
        instruction=f"Given a question in {row.get('language', 'English')}, find its answer",
    )
