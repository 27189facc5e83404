"""Fields that nothing reads are named once, as a warning where a loss or the prompt might want them."""

from __future__ import annotations

import logging

from ullme.data.datamodule import ULLMEDataModule


def messages(path, caplog) -> list[tuple[str, str]]:
    data = ULLMEDataModule(train=path, num_hard_negatives=0, batch_size=2)
    with caplog.at_level(logging.INFO, "ullme.data"):
        data.setup("fit")
        data.setup("fit")
    return [(r.levelname, r.getMessage()) for r in caplog.records if "nothing reads" in r.getMessage()]


def test_numbers_are_a_warning_and_other_fields_are_not(write_jsonl, rows, caplog):
    told = [{**row, "source": "web", "weight": 0.5, "bm25": [1, 2]} for row in rows]
    (first, numbers), (second, others) = messages(write_jsonl(told), caplog)
    assert (first, second) == ("WARNING", "INFO")
    assert "numbers in the fields weight, bm25 of" in numbers
    assert "the fields source of" in others


def test_what_looks_like_an_instruction_is_a_warning(write_jsonl, rows, caplog):
    told = [{**row, "Instruction": f"find {n}"} for n, row in enumerate(rows)]
    [(level, message)] = messages(write_jsonl(told), caplog)
    assert level == "WARNING"
    assert "nothing reads the field Instruction of" in message


def test_a_file_whose_fields_are_all_read_is_not_mentioned(write_jsonl, rows, caplog):
    assert messages(write_jsonl(rows), caplog) == []


def test_a_column_that_no_row_has_is_named(write_jsonl, rows, caplog):
    graded = write_jsonl([{**row, "relevance": 1.0} for row in rows])
    for columns in ({"grade": "relevance"}, {"grade": "relevanse"}):
        ULLMEDataModule(train=graded, num_hard_negatives=0, batch_size=2, columns=columns).setup("fit")
    named = [record.getMessage() for record in caplog.records if "has a number there" in record.getMessage()]
    assert named == [f"data.columns: grade=relevanse: no row of {graded} has a number there"]
