"""Numbers in files, read where they are asked for."""

from __future__ import annotations

import pickle

import numpy as np

from ullme.data import number_files


def test_numbers_of_several_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(number_files, "_BUFFERED", 7)
    writer = number_files.NumbersWriter(tmp_path / "n.npy", np.int64)
    for number in range(100):
        writer.append(number * 10**12)
    writer.close()
    assert np.load(tmp_path / "n.npy").tolist() == [n * 10**12 for n in range(100)]
    numbers = pickle.loads(pickle.dumps(number_files.Numbers(tmp_path / "n.npy")))
    in_memory = number_files.Numbers(np.load(tmp_path / "n.npy"))
    for one in (numbers, in_memory):
        assert [one[n] for n in (0, 50, np.int64(99))] == [0, 50 * 10**12, 99 * 10**12]
        assert one[98:200].tolist() == one.view(98, 200).tolist() == [98 * 10**12, 99 * 10**12]
        assert one[np.array([99, 0])].tolist() == [99 * 10**12, 0]
        assert np.asarray(one).tolist() == one.tolist() == [n * 10**12 for n in range(100)]
    assert len(numbers) == 100
