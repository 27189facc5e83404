from __future__ import annotations

from ullme.commands.cache import main
from ullme.data.sources import JsonlSource


def test_lists_and_clears(tmp_path, capsys, monkeypatch):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q", "pos": ["p"]}\n')
    monkeypatch.setattr("ullme.data.row_index.SMALLEST", 0)
    folder = str(tmp_path / "cache")
    JsonlSource(str(rows), cache_dir=folder)
    assert main(["--cache_dir", folder]) == 0
    assert "1 entries" in capsys.readouterr().out
    monkeypatch.setenv("ULLME_CACHE", folder)
    assert main(["--clear"]) == 0
    assert "removed from" in capsys.readouterr().out
    assert main([]) == 0
    assert "0 entries, 0.000 of at most 100 GB" in capsys.readouterr().out


def test_a_wrong_limit(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("ULLME_CACHE_GB", "-3")
    assert main(["--cache_dir", str(tmp_path)]) == 2
    assert "ULLME_CACHE_GB='-3' must be a size in GB" in capsys.readouterr().err
