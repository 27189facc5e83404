"""``ullme plan``: what it predicts, from which configuration, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from ullme.__main__ import main
from ullme.commands import plan
from ullme.commands.plan import describe
from ullme.engine.objective import Objective
from ullme.engine.presets import grl_terms
from ullme.models.config import BackboneConfig
from ullme.models.loading import load_config
from ullme.planning.devices import DEVICES, Device, this_cpu
from ullme.planning.flops import model_cost, step_work
from ullme.planning.memory import GIB
from ullme.planning.plan import Job, make_plan, typical_batch
from ullme.utils.precision import cpu_rates

SMALL = Device("small", tflops=1.0, memory_gib=1.2)


@pytest.fixture
def job(llm_folder):
    options = BackboneConfig(llm_folder("llama"), lora_r=4, dtype="float32")
    return Job(
        options,
        load_config(options),
        Objective(grl_terms()),
        batch_size=8,
        candidates=3,
        rows=100,
        passage_tokens=20,
        passage_max_length=60,
        half=False,
    )


def with_(job: Job, **changes) -> Job:
    return Job(**{**vars(job), **changes})


def test_hours_follow_from_the_flops(job):
    plan = make_plan(job, SMALL, utilisation=0.5)
    batch = typical_batch(job, 8)
    assert len(batch) == 8
    assert batch.num_candidates == 3
    work = step_work(batch, job.objective, False, True)
    flops = model_cost(job.config, job.options).step(work).item()
    assert plan.step_flops == pytest.approx(flops)
    run = flops + model_cost(job.config, job.options).forward(work.reference, adapters=False).item()
    assert plan.seconds == pytest.approx(run / 0.5e12)
    assert plan.seconds_with_cache == pytest.approx(flops / 0.5e12)
    assert f"cache     {flops / 0.5e12:.2f} s a step once loss.cache_reference holds" in describe(plan)
    assert plan.steps == 12
    assert plan.hours == pytest.approx(12 * plan.seconds / 3600)
    assert plan.mfu == pytest.approx(0.5 * flops / run)
    assert plan.mfu < 0.45
    spread = make_plan(job, SMALL, num_devices=4, utilisation=0.5)
    assert spread.step_flops == pytest.approx(flops / 4, rel=0.15)  # other random lengths


def test_time_from_its_parts(job):
    """Products at 75 % of the peak, and the bytes that other kernels move at 80 % of the bandwidth."""
    fast, slow = (replace(SMALL, bandwidth=bandwidth) for bandwidth in (1e6, 1.0))
    plan = make_plan(job, fast)
    products, others = plan.parts.values()
    assert products == pytest.approx(plan.hardware_flops / 0.75e12)
    assert others == pytest.approx(plan.traffic / (0.8 * 1e15))
    assert plan.seconds == products + others
    assert plan.utilisation == pytest.approx(0.75 * products / plan.seconds)
    alone = make_plan(with_(job, objective=Objective(grl_terms(None, use_kl=False))), fast)
    assert "cache" not in describe(alone)
    assert plan.seconds > plan.seconds_with_cache > alone.seconds == alone.seconds_with_cache
    assert "limit     matrix products" in describe(plan)
    assert "limit     other kernels" in describe(make_plan(job, slow))
    assert "limit" not in describe(make_plan(job, fast, utilisation=0.5))
    chunks = make_plan(with_(job, chunk_size=3), fast)
    recomputed = with_(job, chunk_size=3, options=replace(job.options, gradient_checkpointing=True))
    assert plan.traffic < chunks.traffic < make_plan(recomputed, fast).traffic


def test_typical_lengths(job):
    batch = typical_batch(with_(job, passage_tokens=75, passage_max_length=256), 2000)
    lengths = batch.passages.attention_mask.sum(1).double()
    assert lengths.mean() == pytest.approx(75, rel=0.02)
    assert lengths.log().std() == pytest.approx(0.4, rel=0.05)
    assert set(batch.queries.attention_mask.sum(1).tolist()) == {30}
    assert torch.equal(batch.generation.targets.attention_mask.sum(1), (lengths + 1).clamp(max=256).long())


def test_an_open_chunk_becomes_the_largest_that_fits(job):
    many = with_(job, batch_size=2000)
    found = {}
    for room in (1.25, 1.5):
        device = Device("small", 1.0, room)
        plan = make_plan(many, device)
        assert plan.fits
        assert plan.memory.total <= 0.92 * room * GIB
        found[room] = plan.job.chunk_tokens
        doubled = make_plan(with_(many, chunk_tokens=2 * found[room]), device)
        assert not doubled.fits
        assert "does NOT fit" in describe(doubled)
    assert found[1.25] < found[1.5]


def test_layers_are_recomputed_only_where_memory_needs_it(job):
    many = with_(job, batch_size=2000, options=replace(job.options, gradient_checkpointing="auto"))
    least = make_plan(with_(job, batch_size=2000, chunk_tokens=8192), SMALL).memory.total / GIB / 0.92
    roomy, tight = (make_plan(many, Device("d", 1.0, room)) for room in (1.001 * least, 0.999 * least))
    assert roomy.fits
    assert not roomy.job.options.gradient_checkpointing
    assert tight.fits
    assert tight.job.options.gradient_checkpointing
    assert tight.seconds > 1.2 * roomy.seconds
    assert tight.mfu < roomy.mfu


def test_extra_positives_are_embedded_and_not_generated(job):
    """Two of them beside nine candidates: the tokens of eleven passages are embedded, those of nine generated."""
    plain, several = typical_batch(job, 500), typical_batch(with_(job, extra_positives=2), 500)
    assert torch.equal(several.passages.host_lengths, plain.passages.host_lengths)
    passages = several.num_tokens - several.queries.num_tokens
    assert passages == pytest.approx(plain.passages.num_tokens * (job.candidates + 2) / job.candidates, rel=0.02)
    found = [step_work(batch, job.objective, causal=False, share_prompts=True) for batch in (plain, several)]
    assert found[1].learned == found[0].learned
    assert found[1].reference == found[0].reference
    assert found[1].learned.tokens > 0


def test_what_is_left_of_memory_saves_the_first_forward(job):
    """Of few tokens, of some, of all; and never where the chunk is settled, or layers are recomputed."""
    many = with_(job, batch_size=6000)
    needed = make_plan(with_(many, chunk_tokens=2**16), SMALL).memory.total / GIB / 0.92  # the largest that is tried
    rooms = [1.1 * needed, 1.3 * needed, 100 * needed]
    plans = [make_plan(many, Device("d", 1.0, room)) for room in rooms]
    assert [plan.job.chunk_tokens for plan in plans] == [2**16] * 3
    assert plans[0].chunks > 1
    tokens = typical_batch(many, 6000).num_tokens
    assert 0 < plans[0].retained_tokens < plans[1].retained_tokens < plans[2].retained_tokens == tokens
    assert plans[0].seconds > plans[1].seconds > plans[2].seconds
    assert plans[2].hardware_flops == make_plan(with_(many, full_batch=True), SMALL).hardware_flops
    settled = make_plan(with_(many, chunk_tokens=plans[0].job.chunk_tokens), Device("d", 1.0, rooms[0]))
    assert settled.retained_tokens == 0
    assert settled.seconds > plans[0].seconds
    assert "are embedded only once" in describe(plans[0])
    assert "are embedded only once" not in describe(settled)


def test_a_plan_that_does_not_fit_says_what_to_change(job):
    tiny = Device("d", 1.0, 0.01)
    for changes, remedies in (
        ({"full_batch": True}, ["loss=GradCache", "gradient_checkpointing=auto", "dtype=bfloat16", "quantization=nf4"]),
        ({"chunk_size": 8}, ["loss.chunk_tokens=auto"]),
    ):
        plan = make_plan(with_(job, **changes), tiny)
        assert not plan.fits
        assert all(remedy in describe(plan) for remedy in [*remedies, "data.passage_max_length"])
    assert "configs/strategy/fsdp.yaml" in describe(make_plan(job, tiny, num_devices=2))
    assert "fsdp" not in describe(make_plan(job, tiny))


def test_chunks_of_queries_and_none(job):
    assert make_plan(with_(job, chunk_size=3), SMALL).chunks == 3
    whole = make_plan(with_(job, full_batch=True), SMALL)
    assert whole.chunks == 1
    assert whole.hardware_flops < make_plan(with_(job, chunk_size=3), SMALL).hardware_flops  # no first forward


@pytest.mark.parametrize(
    ("count", "utilisation", "message"), [(3, 0.4, "--num_devices=3"), (1, 1.5, "--utilisation=1.5")]
)
def test_refusals(job, count, utilisation, message):
    with pytest.raises(ValueError, match=message):
        make_plan(job, SMALL, count, utilisation=utilisation)


@pytest.fixture
def config(tmp_path, llm_folder):
    """Two configurations to be stacked, of a tiny model and rows in a file."""
    train = tmp_path / "train.jsonl"
    train.write_text("\n".join(json.dumps({"query": "q", "pos": ["p"], "neg": ["n"]}) for _ in range(64)))
    base, own = tmp_path / "base.yaml", tmp_path / "own.yaml"
    base.write_text(
        f"model: {{backbone: {{model_name_or_path: {llm_folder('llama')}, lora_r: 4}}}}\n"
        f"data: {{train: {train}, batch_size: 8, num_hard_negatives: 2}}\n"
        "trainer: {accelerator: gpu, precision: bf16-mixed}\n"
    )
    own.write_text("loss: {class_path: ullme.callbacks.GRL, init_args: {chunk_size: 4, cache_reference: nowhere}}\n")
    return [f"--config={base}", f"--config={own}"]


def parse(*argv: str):
    arguments, overrides = plan.parser().parse_known_args(argv)
    return plan.plan_from(arguments, overrides)[0]


def test_a_plan_reads_the_stacked_configurations_of_train(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = parse(*config, "--device=h200", "--num_devices=2", "--data.num_hard_negatives=4")
    job = plan.job
    assert (job.batch_size, job.candidates, job.rows, job.chunk_size) == (8, 5, 64, 4)
    assert [t.name for t in job.objective.terms] == ["info_nce", "dpo", "kl"]
    assert job.half
    assert (plan.device, plan.num_devices, plan.fsdp) == (DEVICES["h200"], 2, False)
    assert plan.steps == 8
    assert not (tmp_path / "nowhere").exists()  # nothing of the run is made
    assert parse(*config, "--num-devices=2", "--trainer.strategy=fsdp").fsdp
    assert parse(*config, "--strategy=fsdp").fsdp
    assert parse(*config, "--rows=80").steps == 10
    assert parse(*config).num_devices == 1
    assert parse(*config, "--trainer.devices=2", "--trainer.num_nodes=2").num_devices == 4
    assert parse(*config, "--trainer.devices=[0,3]", "--trainer.strategy=fsdp").num_devices == 2
    assert parse(*config, "--trainer.devices=0,3", "--num-devices=4").num_devices == 4
    assert parse(*config, "--trainer.devices=0,3").num_devices == 2


def test_each_dataset_is_charged_with_its_own_terms_and_passages(config, capsys, tmp_path):
    train = str(tmp_path / "train.jsonl")
    sets = [
        {"train": train, "terms": ["info_nce"], "weight": 2},
        {"train": train, "terms": ["info_nce", "kl"], "num_hard_negatives": 1},
        {"train": train},
    ]
    mixture = [*config, "--data.train=null", f"--data.datasets={json.dumps(sets)}", "--utilisation=0.5"]
    arguments, overrides = plan.parser().parse_known_args(mixture)
    whole, datasets = plan.plan_from(arguments, overrides)
    assert [(one.steps, one.job.candidates) for _, one in datasets] == [(16, 3), (8, 2), (8, 3)]
    assert [[term.name for term in one.job.objective.terms] for _, one in datasets] == [
        ["info_nce"],
        ["info_nce", "kl"],
        ["info_nce", "dpo", "kl"],
    ]
    contrastive, ranked, last = (one for _, one in datasets)
    assert last.hardware_flops == whole.hardware_flops > ranked.hardware_flops > contrastive.hardware_flops
    assert contrastive.hardware_flops == make_plan(contrastive.job, whole.device, utilisation=0.5).hardware_flops
    plan.main(mixture)
    out = capsys.readouterr().out
    seconds = [one.seconds for one in (contrastive, ranked, last)]
    mean = (2 * seconds[0] + seconds[1] + seconds[2]) / 4
    assert f"an epoch of 32 steps, {mean:.2f} s a step on average:" in out
    assert f"{train}: 16 steps of info_nce, {seconds[0]:.2f} s each\n" in out
    assert f"{train}: 8 steps of info_nce, dpo, kl, {seconds[2]:.2f} s each (" in out
    assert "average" not in plan.describe(parse(*mixture, "--rows=80"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.datasets=[]"], "give exactly one of them"),
        (["--data.datasets=[]", "--data.train=null"], r"data.datasets=\[\] holds no dataset"),
        (["--data.datasets=[{train: a}]"], "give exactly one of them"),
        (
            ["--data.datasets=[{train: a}]", "--data.train=null", "--data.max_rows=9"],
            "data.max_rows=9 is for data.train",
        ),
        (["--data.num_hard_negatives=-1"], "data.num_hard_negatives=-1 must be at least 0"),
    ],
)
def test_data_that_a_run_refuses_is_not_planned(config, options, message):
    with pytest.raises(ValueError, match=message):
        parse(*config, *options)


def test_the_command(config, capsys):
    with pytest.raises(SystemExit) as end:
        main(["plan", *config])
    assert end.value.code == 0
    out = capsys.readouterr().out
    for word in ("8 queries x 3 passages", "A100-80GB", "fits", "hours an epoch of 8 steps"):
        assert word in out
    for argv, message in (
        (["--config=/no/such.yaml"], "such.yaml"),
        ([], "--config"),
        ([*config, "--rows=0"], "--rows 0 must be at least 1"),
        ([*config, "--data.train=hub/name"], "--rows"),
        ([*config, "--backbone-config=missing"], "--backbone_config=missing"),
        ([*config, "--model.backbone.model_name_or_path=no/where"], "--backbone_config"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["plan", *argv])
        assert end.value.code == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", list(plan.SHAPES))
def test_published_shapes(name):
    """Weights as their publishers count them."""
    billions = {"microsoft/phi-1_5": 1.418, "mistralai/Mistral-7B-Instruct-v0.2": 7.242}
    billions["meta-llama/Meta-Llama-3-8B-Instruct"] = 8.030
    options = BackboneConfig(name, lora_name=None)
    cost = model_cost(plan._llm_config(options, name), options)
    assert cost.parameters / 1e9 == pytest.approx(billions[name], abs=1e-3)


@pytest.mark.slow
def test_the_papers_table():
    table = plan.paper_table(0.6)
    rows = [line.split(" | ") for line in table.splitlines() if "days" in line]
    assert len(rows) == 3
    for cells in rows:
        assert float(cells[2].split()[0]) < 24 * float(cells[1].split()[0])
        assert "does not fit" not in " ".join(cells)


@pytest.fixture
def a_cpu_of_50_gflops(monkeypatch):
    monkeypatch.setenv("ULLME_CPU_GFLOPS", "float32=50,bfloat16=1")
    monkeypatch.setattr("ullme.planning.devices.free_memory", lambda device: 2 * GIB)
    cpu_rates.cache_clear()
    yield
    cpu_rates.cache_clear()


@pytest.mark.usefixtures("a_cpu_of_50_gflops")
def test_a_cpu_is_planned_as_auto_runs_there(job):
    """Small chunks, half of the free memory, no CUDA context, and the measured speed of all threads."""
    device = this_cpu(bfloat16=False)
    assert device.tflops == pytest.approx(0.05 * torch.get_num_threads())
    assert this_cpu(bfloat16=True).tflops == pytest.approx(0.001 * torch.get_num_threads())
    many = with_(job, batch_size=100)
    plan = make_plan(many, device)
    assert plan.job.chunk_tokens == 512
    assert plan.usable_memory == GIB
    assert plan.retained_tokens == typical_batch(many, 100).num_tokens  # all of them
    assert 0 < plan.retained_memory <= GIB - plan.memory.total
    assert plan.seconds == pytest.approx(plan.hardware_flops / (0.75 * device.tflops * 1e12))
    gpu = make_plan(many, replace(device, kind="cuda"))
    assert gpu.job.chunk_tokens > 512
    assert gpu.memory.overhead > plan.memory.overhead + 0.3 * GIB
    assert "50 GFLOP/s a core in float32" in describe(plan)
