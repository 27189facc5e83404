"""The benchmark scripts run: what they print is for a quiet machine, that they work is for here."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from search_helpers import StubEmbedder, encoded, write_corpus
from test_training import write_rows
from tiny import make_tokenizer

from ullme.data.sampler import Draw
from ullme.models.checkpoint import save_adapter
from ullme.search.bm25 import build_index
from ullme.search.searcher import Searcher
from ullme.search.shards import Shards

FOLDER = Path(__file__).parents[1] / "benchmarks"


def load(name: str, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_the_likelihood_filter_beside_a_teacher(tmp_path, monkeypatch, capsys):
    script = load("likelihood_filter", monkeypatch)
    row = {"pos_likelihoods": [-1.0], "pos_scores": [0.8]}
    rows = [
        {**row, "neg_likelihoods": [-0.9, -1.05, -3.0], "neg_scores": [0.77, 0.1, 0.1]},
        {**row, "neg_likelihoods": [-0.5, -2.0, -2.0], "neg_scores": [0.7, 0.9, 0.2]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    script.main([str(tmp_path / "rows.jsonl"), "--margins", "0", "0.1"])
    first, none, some = capsys.readouterr().out.splitlines()
    assert first == "2 rows, 6 negatives, 2 false"
    assert none.startswith("margin 0: 33.3% dropped; false: 50.0% of the dropped, 25.0% of the kept")
    assert some.startswith("margin 0.1: 50.0% dropped; false: 33.3% of the dropped, 33.3% of the kept")


def test_the_prefix_of_query_writing(tmp_path, monkeypatch, capsys, llm_folder):
    script = load("query_prefix", monkeypatch)
    corpus, llm = write_corpus(tmp_path / "c.jsonl", 3), llm_folder("llama", max_position_embeddings=2048)
    sizes = ["--documents=3", "--document_max_length=8", "--max_new_tokens=2", "--rounds=1"]
    script.main([f"--llm={llm}", f"--corpus={corpus}", *sizes])
    assert "3 documents on cpu: " in (out := capsys.readouterr().out)
    assert "3 queries are the same" in out


def test_the_cost_of_a_cached_teacher(tmp_path, monkeypatch, capsys, llm_folder):
    script = load("cached_teacher", monkeypatch)
    rows = [{"query": f"query {n}", "pos": [f"passage {n}"], "neg": [f"other {n}"] * (1 + n % 2)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    options = [
        f"--llm={llm_folder('llama')}",
        f"--rows={tmp_path / 'rows.jsonl'}",
        "--negatives=2",
        "--rounds=1",
        "--query_max_length=64",
    ]
    script.main([*options, "--queries=2"])
    printed = capsys.readouterr().out.splitlines()[-3:]
    assert [line.split(":")[0] for line in printed] == ["CL", "CL + KL, teacher computed", "CL + KL, warm cache"]
    assert printed[0].endswith("1.00 times CL")
    with pytest.raises(ValueError, match="no row has --negatives=3"):
        script.main([*options, "--negatives=3"])


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        pytest.param("mistral-7b", ["train", "encode"], marks=pytest.mark.slow),
        pytest.param("phi-1.5", ["train", "encode", "memory", "profile"], marks=pytest.mark.slow),
        pytest.param("llama-3-8b", ["compile"], marks=pytest.mark.slow),
    ],
)
def test_the_gpu_script_on_a_toy(model, parts, tmp_path, monkeypatch, capsys):
    gpu = load("gpu", monkeypatch)
    place = tmp_path / "gpu.json"
    place.write_text(json.dumps({"models": {"other": {"train": {"seconds": 1.0}}}}))
    gpu.main(["--tiny", "--device", "cpu", "--models", model, "--parts", *parts, "--output", str(place)])
    found = json.loads(place.read_text())
    assert found["product_tflops"] > 0
    assert "torch" in found["machine"]
    assert "--tiny" in found["command"]
    assert found["models"]["other"] == {"train": {"seconds": 1.0}}, "parts of other runs stay"
    results = found["models"][model]
    assert set(parts) <= set(results)
    assert "error" not in json.dumps(results)
    if "train" in parts:
        assert results["model"]["attention_path"] == "packed"
        for step in results["train"].values():
            assert step["epoch_hours"] == pytest.approx(545 * step["seconds"] / 3600)
            assert step["mfu"] > 0
    if "encode" in parts:
        assert results["encode"]["tokens_per_second"] > results["encode"]["passages_per_second"] > 0
    if "memory" in parts:
        assert set(results["memory"]["peak_gib"]) == {"2", "4"}
        assert 0 < sum(cost["share"] for cost in results["profile"]) <= 1
    if "compile" in parts:
        assert all(results["compile"][on]["seconds"] > 0 for on in ("on", "off"))
    assert f"| {model} |" in capsys.readouterr().out


def test_the_gpu_script_keeps_what_works_when_a_part_fails(tmp_path, monkeypatch):
    gpu = load("gpu", monkeypatch)

    def fail(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "train", fail)
    place = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--device=cpu", "--models", "llama-3-8b", "--parts", "train", "encode", f"--output={place}"])
    results = json.loads(place.read_text())["models"]["llama-3-8b"]
    assert results["train"] == {"error": "RuntimeError: no such kernel"}
    assert results["encode"]["seconds"] > 0


def test_the_gpu_script_without_a_gpu(monkeypatch, capsys):
    gpu = load("gpu", monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(SystemExit) as end:
        gpu.main([])
    assert end.value.code == 2
    assert "--tiny --device cpu" in capsys.readouterr().err


def test_a_toys_figures_are_not_kept_beside_real_ones(monkeypatch):
    gpu = load("gpu", monkeypatch)
    written = []
    monkeypatch.setattr(gpu, "measure", lambda *a: a[-1]("model", {}))
    monkeypatch.setattr(Path, "write_text", lambda *a: written.append(a))
    gpu.main(["--tiny", "--device", "cpu"])
    assert written == []


def test_growth_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    scaling = load("scaling", monkeypatch)
    monkeypatch.setattr(scaling, "AXES", {"batch": (2, 4), "vocabulary": (512, 1024)})
    asked = []

    def measure(axis, value):
        if len(asked) == 3:
            raise KeyboardInterrupt
        asked.append((axis, value))
        return {"value": value, "tokens": 10 * value, "seconds": float(value**2), "mb": 7.0}

    monkeypatch.setattr(scaling, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        scaling.main(["--results", str(tmp_path)])
    asked.clear()
    scaling.main(["--results", str(tmp_path)])
    assert asked == [("vocabulary", 1024)]
    found = json.loads((tmp_path / "scaling.json").read_text())
    assert scaling.growth(found["batch"], "seconds", "tokens") == pytest.approx(2)
    assert (tmp_path / "scaling.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_point_of_every_axis(tmp_path, monkeypatch):
    scaling = load("scaling", monkeypatch)
    axes = {"batch": (2,), "negatives": (1,), "passage length": (16,), "vocabulary": (512,)}
    monkeypatch.setattr(scaling, "AXES", axes)
    for axis, (value,) in axes.items():
        point = scaling.measure(axis, value)
        assert point["seconds"] > 0 < point["mb"]


@pytest.mark.slow
def test_nested_embeddings_on_a_toy(llm_folder, tmp_path, monkeypatch, capsys):
    """Two steps with each loss: a line, a plot and a table, and no second training of what is there."""
    nested = load("nested", monkeypatch)
    write_rows(tmp_path)
    arguments = ["--model", llm_folder(), "--data", str(tmp_path), "--train=train.jsonl", "--corpora=beir"]
    arguments += ["--steps=2", "--batch_size=4", "--dims", "16", "8", "--results", str(tmp_path / "nested.jsonl")]
    nested.main(arguments)
    lines = [json.loads(line) for line in (tmp_path / "nested.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == list(nested.LOSSES)
    for line in lines:
        assert list(line["ndcg@10"]) == ["32", "16", "8"]
        assert all(0 < score <= 100 for scores in line["ndcg@10"].values() for score in scores.values())
    assert lines[0]["loss_by_step"][0] < lines[1]["loss_by_step"][0]  # a sum over three widths
    assert "| beir | 8 | binary | 1 |" in capsys.readouterr().out
    assert (tmp_path / "nested.png").stat().st_size > 1000
    monkeypatch.setattr(nested, "run", None)
    nested.main(arguments)
    assert len((tmp_path / "nested.jsonl").read_text().splitlines()) == 2


def test_encoding_into_shards_on_a_toy(llm_folder, tmp_path, monkeypatch, capsys):
    """Both sides embed the same, which the script checks itself."""
    benchmark = load("encode_shards", monkeypatch)
    corpus, place = write_corpus(tmp_path / "corpus.jsonl", 20), tmp_path / "result.json"
    options = ["--passages=20", "--rounds=2", "--max_length=64", "--output", str(place)]
    benchmark.main([llm_folder("llama"), str(corpus), *options])
    found = json.loads(place.read_text())
    assert found["passages"] == 20
    assert found["ratio"] > 0
    assert len(found["rounds"]) == 2
    assert str(tmp_path) not in place.read_text()
    assert "passages a CPU second" in capsys.readouterr().out


def test_quantised_similarities(monkeypatch):
    """The cosine of signs is the share of equal signs less that of unequal ones; 8 bits move a cosine little."""
    pytest.importorskip("sentence_transformers")
    nested = load("nested", monkeypatch)
    corpus = torch.nn.functional.normalize(torch.randn(50, 16), dim=-1)
    queries = corpus[:3]  # no query is outside of the ranges
    left, right = nested.quantised(queries, corpus, "binary")
    equal = ((queries[:, None] > 0) == (corpus > 0)).float().mean(-1)
    torch.testing.assert_close(left @ right.T, 2 * equal - 1)
    left, right = nested.quantised(queries, corpus, "int8")
    assert 0 < (left @ right.T - queries @ corpus.T).abs().max() < 0.01


def test_the_start_on_many_rows_is_measured(tmp_path, monkeypatch):
    benchmark = load("loader_start", monkeypatch)
    benchmark.write_rows(tmp_path / "train.jsonl", 2001)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert len(rows) == 2001
    assert len({row["query"] for row in rows}) == 2000  # row 1000 has the query of row 500
    assert len({row["pos"][0] for row in rows}) == 2001
    folder = tmp_path / "tokenizer"
    make_tokenizer().save_pretrained(folder)
    found = benchmark.start(str(tmp_path / "train.jsonl"), str(folder), 1)
    memory = {"memory_mib", "peak_memory_mib"}
    assert found.keys() - memory == {
        *("seconds", "cpu_seconds", "rows_read_per_cpu_second", "rows_tokenised_per_cpu_second")
    }
    assert memory <= found.keys()
    assert all(found[name] > 0 for name in found.keys() - memory)


@pytest.mark.slow
def test_the_profile_of_a_step_finds_its_parts(monkeypatch, capsys):
    found = load("profile_step", monkeypatch).main(["--queries=1"])
    for seconds in found.values():
        whole, products = seconds.pop("whole step"), seconds.pop("the products alone")
        assert sum(seconds.values()) == pytest.approx(whole)
        assert products > 0
        assert all(
            seconds[name] > 0 for name in ("products of frozen weights", "LoRA's products", "attention", "rotary")
        )
    assert "| norms |" in capsys.readouterr().out


def test_what_an_embedder_knows_of_the_teacher(monkeypatch):
    script = load("teacher_agreement", monkeypatch)
    student = np.array([[0.9, 0.1], [0.2, 0.3], [0.5, 0.1], [0.0, 0.4]])
    teacher = np.array([[-1.0, -2.0], [-1.0, -3.0], [-2.0, -1.0], [-5.0, -1.0]])
    found = script.compared(student, teacher)
    assert {name: found[name] for name in ("right", "teacher right", "same first")} == {
        "right": 0.5,
        "teacher right": 0.5,
        "same first": 0.5,
    }
    assert found["only teacher right"] == found["only cosine right"] == 0.25
    assert script.compared(teacher / 5, teacher)["KL"] == pytest.approx(0), "0.05 and 0.25: the same distribution"
    assert found["KL"] > 0.1
    assert script.positive_cross_entropy(teacher[:2], 1.0) == pytest.approx(
        (math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 2
    )
    assert script.positive_cross_entropy(np.zeros((3, 5)), 0.05) == pytest.approx(math.log(5))


def test_an_embedder_beside_its_own_llm(tmp_path, monkeypatch, capsys, make_model):
    script, run = load("teacher_agreement", monkeypatch), save_adapter(make_model("llama"), tmp_path / "run")
    rows = [{"query": f"query {n}", "pos": [f"passage {n}"], "neg": [f"other {n}"] * (1 + n % 2)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    script.main([str(run), f"--rows={tmp_path / 'rows.jsonl'}", "--negatives=2", "--query_max_length=99"])
    out = capsys.readouterr().out
    assert "2 rows; right " in out
    assert out.count("-log P(positive) at 0.01: ") == 2, "of the teacher and of the run"
    with pytest.raises(ValueError, match="no row has --negatives=3"):
        script.main([str(run), f"--rows={tmp_path / 'rows.jsonl'}", "--negatives=3"])


def test_what_a_tuned_weight_of_fusion_gains(monkeypatch):
    script = load("fusion_weights", monkeypatch)
    scores = {0.0: np.full(8, 40.0), 0.5: np.full(8, 60.0), 1.0: np.full(8, 50.0)}
    assert script.tuned_gains(scores, tuning=3, draws=4, seed=0).tolist() == [10.0] * 4
    scores[0.5] = np.array([100.0] * 4 + [0.0] * 4)  # chosen where the draw has more than two of the first four
    gains = script.tuned_gains(scores, tuning=4, draws=50, seed=0)
    # of the others 100 k / 4 with k of the first four: 25 below dense search's 50 where the draw took three of them
    assert set(gains.round(6).tolist()) <= {-50.0, -25.0, 0.0}
    assert {-25.0, 0.0} <= set(gains.round(6).tolist())


def test_fusion_of_an_encoded_collection(tmp_path, monkeypatch, capsys):
    pytest.importorskip("bm25s")
    script, folder = load("fusion_weights", monkeypatch), encoded(tmp_path / "e", number=30)
    build_index(Shards(folder))
    queries = [{"_id": name, "text": text} for name, text in (("a", "n3"), ("b", "n9"))]
    (tmp_path / "c" / "qrels").mkdir(parents=True)
    (tmp_path / "c" / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in queries))
    (tmp_path / "c" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\na\td3\t1\nb\td9\t1\n")
    monkeypatch.setattr(script, "Searcher", lambda folder: Searcher(folder, StubEmbedder(), device="cpu"))
    script.main([str(folder), f"--collection={tmp_path / 'c'}", "--draws=2"])
    out = capsys.readouterr().out
    assert "2 queries; dense " in out
    assert "BM25 100.0" in out
    assert out.count("; tuned ") == 2


def test_how_the_likelihoods_of_an_llm_rank(tmp_path, monkeypatch, capsys, llm_folder):
    script = load("likelihood_rankings", monkeypatch)
    rows = [{"query": f"query {n}", "pos": [f"passage {n}"], "neg": [f"other {n}", f"more {n}"]} for n in range(3)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    script.main([llm := str(llm_folder("llama")), f"--rows={tmp_path / 'rows.jsonl'}", "--negatives=2"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == f"{llm}: 3 rows of 3 candidates"
    assert [line.split(":")[0].strip() for line in lines] == ["passage_given_query", "query_given_passage", "gain"]
    assert len({line.split("MRR")[1] for line in lines}) == 3, "three scores"


def test_the_gain_is_over_the_passage_after_an_empty_query(monkeypatch, make_model):
    script, model = load("likelihood_rankings", monkeypatch), make_model("llama")
    draws = [Draw(f"query {n}", f"passage {n}", [f"other {n}"], None) for n in range(3)]
    given, alone = (
        script.scores(model, rows, "passage_given_query", (99, 99))
        for rows in (draws, [one._replace(query="") for one in draws])
    )
    gain = script.scores(model, draws, "gain", (99, 99))
    assert gain.abs().min() > 1e-6
    torch.testing.assert_close(gain, given - alone)
