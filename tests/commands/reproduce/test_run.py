"""The runner with commands that take no time; the last test has the real ones."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from children import PATIENCE, start_process, wait_until
from test_notebooks import run as run_notebook
from tiny import save_llm

from ullme.commands.reproduce import collect, preflight, run
from ullme.commands.reproduce.cells import Cell
from ullme.commands.reproduce.cli import main, parser, read_table
from ullme.commands.reproduce.run import Devices, Runner
from ullme.commands.reproduce.scores import read_scores
from ullme.demo.world import build_world

CONFIGS = Path(__file__).parents[3] / "configs"
ROWS = [{"task": "facts-0123abcd", "type": "Retrieval", "main_score": "ndcg_at_10", "score": 50.0, "error": None}]


class Fake(Cell):
    """A cell whose training appends a line to trained.txt and whose evaluation writes the scores it is told to."""

    rows = tuple(ROWS)
    ending = "pass"

    def train_command(self, stage):
        code = (
            f"import os, pathlib, sys, time; f = pathlib.Path({str(self.run_folder(stage))!r});"
            "(f / 'checkpoints').mkdir(parents=True, exist_ok=True);"
            "print(os.environ['CUDA_VISIBLE_DEVICES'], file=open(f.parent / 'trained.txt', 'a'));"
            f"{self.ending};"
            "(f / 'checkpoints' / 'finished').write_text('1 step');"
            '(f / \'seen.json\').write_text(\'{"tokens": 7, "queries": 2, "seconds": 0.5}\')'
        )
        return ["-c", code]

    def evaluate_command(self):
        text = json.dumps(self.rows)
        code = (
            f"import pathlib; f = pathlib.Path({str(self.folder)!r}); (f / 'tasks.json').write_text({text!r});"
            "(f / 'per_query').mkdir(exist_ok=True);"
            "(f / 'per_query' / 'facts-0123abcd.json').write_text('{\"q1\": 0.25, \"q2\": 0.75}')"
        )
        return ["-c", code]

    def settings(self):
        return {"evaluate": [], "lr": type(self).__name__}


class Failing(Fake):
    ending = "sys.exit('no such data')"


class Waiting(Fake):
    ending = f"open(f / 'started', 'w').close(); time.sleep({PATIENCE})"


class Meeting(Fake):
    """Goes on only when another one has started too."""

    ending = (
        "open(f / 'started', 'w').close();"
        f"until = time.monotonic() + {PATIENCE};"
        "exec(\"while len(list(f.parent.parent.glob('*/train/started'))) < 2 and time.monotonic() < until: time.sleep(.01)\");"
        "time.monotonic() < until or sys.exit('alone')"
    )


@pytest.fixture
def cells(tmp_path):
    def make(*kinds, row="grl"):
        table = read_table(parser().parse_args([f"--config={CONFIGS}/paper/miniature.yaml", f"--output={tmp_path}"]))
        return [kind(table, "tiny", row, seed) for seed, kind in enumerate(kinds)]

    return make


def runner(cells, parallel=1, devices=()):
    return Runner(cells, parallel, Devices(devices), 1)


def trainings(cell):
    return (cell.folder / "trained.txt").read_text().splitlines()


def test_a_cell_is_trained_evaluated_and_written_down(cells, tmp_path):
    [cell] = cells(Fake)
    assert runner([cell]).run() == {}
    [scores] = read_scores(tmp_path)
    assert (scores.model, scores.row, scores.seed) == ("tiny", "grl", 0)
    assert [(t.name, t.type, t.metric, t.score) for t in scores.tasks] == [("facts", "Retrieval", "ndcg_at_10", 0.5)]
    assert scores.queries == {"facts": {"q1": 0.25, "q2": 0.75}}
    assert len(scores.commands) == 2
    assert scores.notes["tokens"] == 7
    assert set(scores.notes["seconds"]) == {"train", "evaluate"}
    assert run.done(cell)


def test_stages_follow_each_other_and_their_tokens_are_summed(cells, tmp_path):
    [cell] = cells(Fake, row="llm2vec")
    assert runner([cell]).run() == {}
    assert len(trainings(cell)) == 2
    assert read_scores(tmp_path)[0].notes["tokens"] == 14


def test_a_failed_cell_is_named_and_the_others_go_on(cells, tmp_path, capsys):
    failed = runner(cells(Failing, Fake)).run()
    assert list(failed) == ["tiny/grl/seed0"]
    assert "no such data" in failed["tiny/grl/seed0"]
    assert [scores.seed for scores in read_scores(tmp_path)] == [1]
    failing = cells(Failing)[0]
    assert collect.seconds(failing)["train"] > 0
    assert "tiny/grl/seed0 failed" in capsys.readouterr().err


def test_the_reason_is_this_start_s_and_a_signal_has_its_name(cells):
    class Killed(Fake):
        ending = "os.kill(os.getpid(), 9)"

    class Wrong(Fake):
        ending = "sys.exit('error: no such data')"

    [cell] = cells(Wrong)
    assert "error: no such data" in runner([cell]).run()[cell.name]
    [again] = cells(Killed)
    reason = runner([again]).run()[cell.name]
    assert "SIGKILL" in reason
    assert "no such data" not in reason


def test_what_does_not_end_when_told_to_is_killed(cells, monkeypatch, capsys):
    class Deaf(Fake):
        ending = f"__import__('signal').signal(15, 1); {Waiting.ending}"

    monkeypatch.setattr(run, "STOP_TIMEOUT", 0.5)
    [cell] = cells(Deaf)
    thread = threading.Thread(target=_terminate_once, args=[cell.folder / "train" / "started"])
    thread.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner([cell]).run()
    thread.join()
    assert time.monotonic() - started < PATIENCE
    assert "did not end in 0.5 s: killed" in capsys.readouterr().err
    with run.locked(cell.folder):
        pass


def _terminate_once(there):
    wait_until(there.exists, str(there))
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_failed_task_leaves_the_cell_undone_and_keeps_the_other_scores(cells, tmp_path):
    class Unreachable(Fake):
        rows = (*ROWS, {**ROWS[0], "task": "NQ", "score": None, "error": "NQ: not on this machine"})

        def evaluate_command(self):
            return ["-c", f"{super().evaluate_command()[1]}; raise SystemExit(1)"]

    [cell] = cells(Unreachable)
    failed = runner([cell]).run()
    assert failed[cell.name].splitlines() == ["1 of 2 tasks failed", "NQ: not on this machine"]
    [scores] = read_scores(tmp_path)
    assert [task.name for task in scores.tasks] == ["facts"]
    assert scores.failed == {"NQ": "NQ: not on this machine"}
    assert not run.done(cell)
    [again] = cells(type("Unreachable", (Fake,), {}))
    assert runner([again]).run() == {}
    assert run.done(again)
    assert len(trainings(again)) == 1


def test_the_scores_of_an_earlier_evaluation_are_not_taken_for_those_of_one_that_was_killed(cells, tmp_path):
    class Killed(Fake):
        def evaluate_command(self):
            return ["-c", "import os; os.kill(os.getpid(), 9)"]

    [cell] = cells(Fake)
    runner([cell]).run()
    (cell.folder / "scores.json").unlink()
    [again] = cells(Killed)
    assert "SIGKILL" in runner([again]).run()[again.name]
    assert read_scores(tmp_path) == []


def test_a_finished_training_is_not_done_again(cells):
    [cell] = cells(Fake)
    runner([cell]).run()
    (cell.folder / "scores.json").unlink()
    assert not run.done(cell)
    runner([cell]).run()
    assert len(trainings(cell)) == 1


def test_a_cell_made_with_other_settings_is_refused(cells):
    runner(cells(Fake)).run()
    with pytest.raises(ValueError, match=r"lr='Fake' \(now 'Waiting'\)"):
        run.done(cells(Waiting)[0])


def test_two_runners_do_not_work_on_the_same_cell(cells):
    [cell] = cells(Fake)
    with run.locked(cell.folder):
        assert "another process works on" in runner([cell]).run()[cell.name]
    assert runner([cell]).run() == {}


def test_each_gpu_has_one_cell_at_a_time(cells):
    class OneGpu(Meeting):
        """Holds a file named after its GPU, which must not be there yet."""

        devices = 1
        ending = (
            "lock = f.parent.parent / ('gpu' + os.environ['CUDA_VISIBLE_DEVICES']); lock.open('x');"
            f"{Meeting.ending}; time.sleep(0.2); lock.unlink()"
        )

    made = cells(*[OneGpu] * 4)
    assert runner(made, parallel=4, devices=["0", "1"]).run() == {}
    assert {gpu for cell in made for gpu in trainings(cell)} == {"0", "1"}


def test_a_cell_gets_as_many_gpus_as_it_asks_for(cells, monkeypatch):
    class Two(Fake):
        devices = 2

    processes = []
    monkeypatch.setattr(run, "with_torchrun", lambda command, devices: processes.append(devices) or command)
    [cell] = cells(Two)
    assert runner([cell], devices=["3", "5", "7"]).run() == {}
    assert trainings(cell) == ["3,5"]
    assert processes == [2]


def test_an_evaluation_on_several_gpus_is_started_by_torchrun():
    assert run.with_torchrun(["evaluate.py"], 1) == ["evaluate.py"]
    command = run.with_torchrun(["evaluate.py"], 2)
    assert command[:2] == ["-m", "torch.distributed.run"]
    assert "--nproc-per-node=2" in command
    assert command[-1] == "evaluate.py"


def test_cells_run_in_parallel(cells):
    assert runner(cells(Meeting, Meeting), parallel=2).run() == {}


def test_sigterm_is_handed_on_and_what_was_done_stays(cells, tmp_path):
    first, second, third = cells(Fake, Waiting, Fake)

    thread = threading.Thread(target=_terminate_once, args=[second.folder / "train" / "started"])
    thread.start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        runner([first, second, third]).run()
    thread.join()
    assert time.monotonic() - started < PATIENCE
    assert [scores.seed for scores in read_scores(tmp_path)] == [0]
    assert not (second.folder / "train" / "checkpoints" / "finished").exists()
    assert not third.folder.exists()


def test_too_few_gpus_are_said_before_anything_runs(cells, monkeypatch):
    class Four(Fake):
        devices = 4

    monkeypatch.setattr(preflight, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(ValueError, match=r"trainer\.devices=4 on accelerator gpu, but there are 2 GPUs"):
        preflight.runner(cells(Four), "auto")


@pytest.mark.parametrize(
    ("told", "expected"), [(None, ["0", "1"]), ("5,2", ["5", "2"]), ("GPU-a,GPU-b", ["GPU-a", "GPU-b"])]
)
def test_visible_gpus(monkeypatch, told, expected):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if told:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
    assert preflight.visible_gpus() == expected


def test_names_lose_the_hash_of_a_local_file_only():
    assert [collect.plain_name(n) for n in ("banking77-1a2b3c4d", "STS17", "msmarco-dev")] == [
        "banking77",
        "STS17",
        "msmarco-dev",
    ]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_table_from_end_to_end_stopped_on_its_way(tmp_path, monkeypatch):
    """Real training and evaluation of an untrained, a trained, a two-stage and a given embedder; killed, gone on with."""
    llm = save_llm(tmp_path / "tiny-llm", "llama")
    world = build_world(tmp_path / "world", train_entities=30, val_entities=12, dev_entities=12, distractors=20)
    paper = yaml.safe_load((CONFIGS / "paper" / "miniature.yaml").read_text())
    rows = {name: paper["rows"][name] for name in ("base", "grl", "llm2vec")}
    for row in rows.values():
        for stage in row["stages"]:
            stage["config"] = str(CONFIGS / "paper" / stage["config"])
    rows["given"] = {"label": "Given", "model": llm, "evaluate_options": {"query_prompt": "{text}"}}
    table = {
        **{name: paper[name] for name in ("models", "train_options")},
        "title": "T",
        "rows": rows,
        "order": ["base", "grl"],
        "output": str(tmp_path / "out"),
        "seeds": [0],
        "configs": [str(CONFIGS / file) for file in ("base.yaml", "strategy/cpu.yaml")],
        "evaluate_options": {"corpus": ["{data}/dev"], "progress": False, "max_length": 64},
    }
    table["train_options"] |= {"trainer.max_steps": 3, "data.batch_size": 4, "data.num_workers": 0}
    validation = {"trainer.val_check_interval": 2, "trainer.check_val_every_n_epoch": None}
    table["train_options"] |= {"data.val": "{data}/val", **validation}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(table))
    options = [f"--config={tmp_path / 'table.yaml'}", f"--llm={llm}", f"--data={world.folder}"]
    command = [sys.executable, "-m", "ullme", "reproduce", *options]
    process = start_process(command, cwd=tmp_path, env=_environment())
    wait_until((tmp_path / "out" / "tiny" / "grl" / "seed0" / "train.log").exists, "the second cell")
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 130
    # what needs no training goes first
    assert sorted(scores.row for scores in read_scores(tmp_path / "out")) == ["base", "given"]
    assert main([*options, "--dry_run"]) == 0
    assert main(options) == 0
    scores = {cell.row: cell for cell in read_scores(tmp_path / "out")}
    assert set(scores) == set(rows)
    for cell in scores.values():
        [task] = cell.tasks
        queries = cell.queries[task.name].values()
        assert task.score == pytest.approx(sum(queries) / len(queries), abs=6e-6)  # mteb rounds to five decimals
    assert scores["grl"].notes["queries"] == 12
    assert scores["grl"].tasks != scores["base"].tasks
    assert (tmp_path / "out" / "report.md").is_file()
    monkeypatch.setenv("ULLME_RESULTS", str(tmp_path / "out"))
    drawn = run_notebook("results.ipynb")
    seen = sorted((list(drawn["rows"])[place], tokens) for tokens, _, place in drawn["points"])
    assert seen == sorted((row, scores[row].notes["tokens"]) for row in ("base", "grl", "llm2vec"))
    assert seen[0] == ("base", 0)
    assert min(tokens for _, tokens in seen[1:]) > 0
    assert [len(curve) for curve in drawn["curves"]] == [1]  # of grl; llm2vec has two stages


def _environment():
    return {**os.environ, "PYTHONPATH": str(CONFIGS.parent), "OMP_NUM_THREADS": "1"}
