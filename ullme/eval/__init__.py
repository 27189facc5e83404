"""Evaluation on mteb's tasks and on local files. mteb is imported when something is evaluated, not before."""

from __future__ import annotations

from ullme.eval.mteb import eval_mteb_dataset, evaluate_tasks, find_tasks
from ullme.eval.table import Row, markdown_table, text_table

__all__ = ["Row", "eval_mteb_dataset", "evaluate_tasks", "find_tasks", "markdown_table", "text_table"]
