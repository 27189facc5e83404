from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from eval_helpers import save_sentence_transformer, save_tiny_llm

from ullme.models import ULLME, WrappedULLME
from ullme.models.checkpoint import save_adapter
from ullme.models.wrapped import is_sentence_transformer, result_name
from ullme.prompts import Prompts

OWN = "contract's own instruction"
PROMPTS = Prompts(query="[Q {instruction}] {text}", passage="[P] {text}", instruction=OWN)


@pytest.fixture(scope="module")
def tiny_llm(tmp_path_factory):
    return save_tiny_llm(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def tiny_sentence_transformer(tmp_path_factory):
    return save_sentence_transformer(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(tiny_llm):
    return WrappedULLME(str(tiny_llm), device="cpu", prompts=PROMPTS)


@pytest.fixture(scope="module")
def adapters(tiny_llm, tmp_path_factory):
    """Two runs of the same backbone with different weights, saved as adapter folders of the same name."""
    folders = []
    for seed in (0, 1):
        trained = ULLME(str(tiny_llm), lora_r=2, lora_alpha=4, pooling="last", prompts=PROMPTS)
        torch.manual_seed(seed)
        for name, weight in trained.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight)
        folders.append(save_adapter(trained, tmp_path_factory.mktemp("runs") / "my run"))
    return folders


def spied(model, monkeypatch) -> list[tuple[str, str | None, str]]:
    """(role, instruction, text) of everything encoded from now on."""
    seen = []
    encode = model.model.encode

    def spy(texts, **kwargs):
        seen.extend((kwargs["role"], kwargs["instruction"], text) for text in texts)
        return encode(texts, **kwargs)

    monkeypatch.setattr(model.model, "encode", spy)
    return seen


def evaluate(model, task):
    from ullme.eval import evaluate_tasks

    [row] = evaluate_tasks(model, [task], show_progress_bar=False)
    return row.score


def mock(name: str, prompt=None):
    """A mock task of mteb's, with a prompt of its own."""
    import mteb.mocks

    base = getattr(mteb.mocks, name)
    return type(name, (base,), {"metadata": base.metadata.model_copy(update={"prompt": prompt})})()


@pytest.mark.parametrize("name", ["MockRetrievalTask", "MockRerankingTask", "MockInstructionRetrieval"])
@pytest.mark.parametrize("prompt", [None, {"query": "find it"}, {"document": "nothing for queries"}, "find it"])
def test_retrieval_has_two_sides(model, monkeypatch, name, prompt):
    seen = spied(model, monkeypatch)
    evaluate(model, mock(name, prompt))
    documents = {text for role, _, text in seen if role == "passage"}
    queries = {text for role, _, text in seen if role == "query"}
    assert all("positive sentence" in text for text in documents)
    assert all("test sentence" in text for text in queries)
    assert len(documents) == len(queries) == 2
    # None stands for the contract's own, which a retrieval task without a query prompt gets.
    own = prompt is None or "document" in prompt
    assert {instruction for _, instruction, _ in seen} == {None if own else "find it"}


SYMMETRIC = [
    "MockBitextMiningTask",
    "MockClassificationTask",
    "MockClusteringTask",
    "MockMultilabelClassification",
    "MockPairClassificationTask",
    "MockSTSTask",
    "MockSummarizationTask",
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SYMMETRIC)
def test_other_tasks_use_the_query_template_everywhere(model, monkeypatch, name):
    seen = spied(model, monkeypatch)
    evaluate(model, mock(name, "the task's instruction"))
    assert {(role, instruction) for role, instruction, _ in seen} == {("query", "the task's instruction")}


def test_without_a_prompt_of_its_own_a_symmetric_task_gets_its_types(model):
    assert model.instruction_for(mock("MockSTSTask").metadata) == "Retrieve semantically similar text."


# arXiv 2401.00368, appendix: E5-mistral's instruction for each of the 56 tasks. Retrieval and reranking have it on the
# queries, the others on every text.
E5_MISTRAL = {
    "AmazonCounterfactualClassification": "Classify a given Amazon customer review text as either counterfactual or not-counterfactual",
    "AmazonPolarityClassification": "Classify Amazon reviews into positive or negative sentiment",
    "AmazonReviewsClassification": "Classify the given Amazon review into its appropriate rating category",
    "Banking77Classification": "Given a online banking query, find the corresponding intents",
    "EmotionClassification": "Classify the emotion expressed in the given Twitter message into one of the six emotions: anger, fear, joy, love, sadness, and surprise",
    "ImdbClassification": "Classify the sentiment expressed in the given movie review text from the IMDB dataset",
    "MassiveIntentClassification": "Given a user utterance as query, find the user intents",
    "MassiveScenarioClassification": "Given a user utterance as query, find the user scenarios",
    "MTOPDomainClassification": "Classify the intent domain of the given utterance in task-oriented conversation",
    "MTOPIntentClassification": "Classify the intent of the given utterance in task-oriented conversation",
    "ToxicConversationsClassification": "Classify the given comments as either toxic or not toxic",
    "TweetSentimentExtractionClassification": "Classify the sentiment of a given tweet as either positive, negative, or neutral",
    "ArxivClusteringP2P": "Identify the main and secondary category of Arxiv papers based on the titles and abstracts",
    "ArxivClusteringS2S": "Identify the main and secondary category of Arxiv papers based on the titles",
    "BiorxivClusteringP2P": "Identify the main category of Biorxiv papers based on the titles and abstracts",
    "BiorxivClusteringS2S": "Identify the main category of Biorxiv papers based on the titles",
    "MedrxivClusteringP2P": "Identify the main category of Medrxiv papers based on the titles and abstracts",
    "MedrxivClusteringS2S": "Identify the main category of Medrxiv papers based on the titles",
    "RedditClustering": "Identify the topic or theme of Reddit posts based on the titles",
    "RedditClusteringP2P": "Identify the topic or theme of Reddit posts based on the titles and posts",
    "StackExchangeClustering": "Identify the topic or theme of StackExchange posts based on the titles",
    "StackExchangeClusteringP2P": "Identify the topic or theme of StackExchange posts based on the given paragraphs",
    "TwentyNewsgroupsClustering": "Identify the topic or theme of the given news articles",
    "SprintDuplicateQuestions": "Retrieve duplicate questions from Sprint forum",
    "TwitterSemEval2015": "Retrieve tweets that are semantically similar to the given tweet",
    "TwitterURLCorpus": "Retrieve tweets that are semantically similar to the given tweet",
    "AskUbuntuDupQuestions": "Retrieve duplicate questions from AskUbuntu forum",
    "MindSmallReranking": "Retrieve relevant news articles based on user browsing history",
    "SciDocsRR": "Given a title of a scientific paper, retrieve the titles of other relevant papers",
    "StackOverflowDupQuestions": "Retrieve duplicate questions from StackOverflow forum",
    "ArguAna": "Given a claim, find documents that refute the claim",
    "ClimateFEVER": "Given a claim about climate change, retrieve documents that support or refute the claim",
    "CQADupstackRetrieval": "Given a question, retrieve detailed question descriptions from Stackexchange that are duplicates to the given question",
    "DBPedia": "Given a query, retrieve relevant entity descriptions from DBPedia",
    "FEVER": "Given a claim, retrieve documents that support or refute the claim",
    "FiQA2018": "Given a financial question, retrieve user replies that best answer the question",
    "HotpotQA": "Given a multi-hop question, retrieve documents that can help answer the question",
    "MSMARCO": "Given a web search query, retrieve relevant passages that answer the query",
    "NFCorpus": "Given a question, retrieve relevant documents that best answer the question",
    "NQ": "Given a question, retrieve Wikipedia passages that answer the question",
    "QuoraRetrieval": "Given a question, retrieve questions that are semantically equivalent to the given question",
    "SCIDOCS": "Given a scientific paper title, retrieve paper abstracts that are cited by the given paper",
    "SciFact": "Given a scientific claim, retrieve documents that support or refute the claim",
    "Touche2020": "Given a question, retrieve detailed and persuasive arguments that answer the question",
    "TRECCOVID": "Given a query on COVID-19, retrieve documents that answer the query",
    "SummEval": "Given a news summary, retrieve other semantically similar summaries",
    **dict.fromkeys(
        ["BIOSSES", "SICK-R", "STS12", "STS13", "STS14", "STS15", "STS16", "STS17", "STS22", "STSBenchmark"],
        "Retrieve semantically similar text",
    ),
}


ONE_OF_A_TYPE = (
    "Banking77Classification",
    "ArxivClusteringS2S",
    "TwitterURLCorpus",
    "SciDocsRR",
    "CQADupstackRetrieval",
    "STS17",
    "SummEval",
)


def test_each_of_the_papers_56_tasks_has_its_instruction_of_e5_mistral(model):
    import mteb

    tasks = {task.metadata.name: task for task in mteb.get_benchmark("MTEB(eng, v1)")}
    assert set(tasks) == set(E5_MISTRAL)
    for name, task in tasks.items():
        for part in getattr(task, "tasks", None) or [task]:
            assert model.instruction_for(part.metadata).rstrip(".") == E5_MISTRAL[name], part.metadata.name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [n if n in ONE_OF_A_TYPE else pytest.param(n, marks=pytest.mark.slow) for n in E5_MISTRAL]
)
def test_each_of_the_papers_56_tasks_has_its_instruction_on_the_right_side(model, monkeypatch, name):
    """What mteb's own evaluation of that kind of task embeds: the task's metadata on a mock of its type."""
    import mteb
    import mteb.mocks

    task = mteb.get_task(name)
    metadata = (getattr(task, "tasks", None) or [task])[0].metadata
    base = getattr(mteb.mocks, MOCKS[metadata.type])
    kept = base.metadata.model_copy(update={"name": metadata.name, "prompt": metadata.prompt, "type": metadata.type})
    seen = spied(model, monkeypatch)
    evaluate(model, type(name, (base,), {"metadata": kept})())
    roles = {role for role, _, _ in seen}
    assert roles == ({"query", "passage"} if metadata.type in ("Retrieval", "Reranking") else {"query"})
    assert {text.rstrip(".") for _, text, _ in seen} == {E5_MISTRAL[name]}
    assert model.model.prompts.around("passage", "anything")[0] == "[P] "  # a passage's template has no place for it


MOCKS = {
    "Retrieval": "MockRetrievalTask",
    "Reranking": "MockRerankingTask",
    "STS": "MockSTSTask",
    "Classification": "MockClassificationTask",
    "Clustering": "MockClusteringTask",
    "PairClassification": "MockPairClassificationTask",
    "Summarization": "MockSummarizationTask",
}


def test_the_text_reaches_the_model_inside_its_template(model, monkeypatch):
    task = mock("MockRetrievalTask", {"query": "find it"})
    rendered = []
    tokenizer = type(model.model.tokenizer)
    call = tokenizer.__call__
    monkeypatch.setattr(
        tokenizer, "__call__", lambda self, text, **kw: (rendered.extend(text), call(self, text, **kw))[1]
    )
    evaluate(model, task)
    assert "[Q find it] This is a test sentence" in rendered
    assert "[P] Title of d1 This is a positive sentence" in rendered


def test_instructions_can_be_replaced_and_switched_off(tiny_llm):
    by_name, by_type = "by name", "by type"
    sts, retrieval = mock("MockSTSTask", "its own").metadata, mock("MockRetrievalTask").metadata
    chosen = WrappedULLME(
        str(tiny_llm), device="cpu", instructions={"MockSTSTask": by_name, "STS": by_type, "Retrieval": by_type}
    )
    assert chosen.instruction_for(sts) == by_name
    assert chosen.instruction_for(retrieval) == by_type
    off = WrappedULLME(str(tiny_llm), device="cpu", use_task_instructions=False, instructions={"STS": by_type})
    assert off.instruction_for(sts) is None


def test_untrained_llm_embeds_without_an_adapter(tiny_llm, model):
    assert model.model.options.lora_name is None
    bare = ULLME(str(tiny_llm), lora_name=None, prompts=PROMPTS).eval()
    texts = ["one", "another text"]
    np.testing.assert_array_equal(model.model.encode(texts, role="query"), bare.encode(texts, role="query"))


def test_a_checkpoint_brings_its_backbone_options_and_prompts(adapters, tiny_llm):
    from ullme.models.checkpoint import load_ullme

    alone = WrappedULLME(model_checkpoint=adapters[0], device="cpu")
    assert alone.model.options.pooling == "last"
    assert alone.model.options.lora_r == 2
    assert alone.model.prompts == PROMPTS
    assert not alone.model.training
    paper = WrappedULLME(
        model_name_or_path=str(tiny_llm),
        model_backbone_type="llama",
        lora_name="ullme",
        lora_r=2,
        lora_alpha=4,
        model_checkpoint=str(adapters[0]),
    )
    trained = load_ullme(adapters[0])
    for one in (alone, paper):
        np.testing.assert_array_equal(one.model.encode(["a text"]), trained.encode(["a text"]))
    untrained = WrappedULLME(str(tiny_llm), device="cpu", pooling="last")
    assert np.abs(untrained.model.encode(["a text"]) - trained.encode(["a text"])).max() > 1e-2


def test_single_prompts_can_be_replaced(adapters):
    changed = WrappedULLME(model_checkpoint=adapters[0], device="cpu", prompts={"query": "{text}"})
    assert changed.model.prompts == Prompts(query="{text}", passage=PROMPTS.passage, instruction=OWN)
    with pytest.raises(ValueError, match="unknown fields"):
        WrappedULLME(model_checkpoint=adapters[0], device="cpu", prompts={"querry": "{text}"})


def test_the_revision_is_that_of_the_content(adapters, tiny_llm):
    def meta(**settings):
        return WrappedULLME(
            model_checkpoint=settings.pop("checkpoint", adapters[0]), device="cpu", **settings
        ).mteb_model_meta

    first = meta()
    assert first.name == "local/tiny-llm--my_run"
    assert meta().revision == first.revision
    others = [
        meta(checkpoint=adapters[1]),
        meta(max_length=64),
        meta(attention="causal"),
        meta(pooling="mean"),
        meta(prompts={"query": "{text}"}),
        meta(use_task_instructions=False),
        meta(instructions={"STS": "x"}),
        meta(dtype="bfloat16"),
        meta(truncate_dim=4),
    ]
    revisions = {first.revision, *(other.revision for other in others)}
    assert len(revisions) == 1 + len(others)
    assert {other.name for other in others} == {first.name}
    assert WrappedULLME(str(tiny_llm), device="cpu").mteb_model_meta.name == "local/tiny-llm"


def test_from_model_uses_the_model_as_it_is(tiny_llm):
    ullme = ULLME(str(tiny_llm), lora_name=None)
    wrapped = WrappedULLME.from_model(ullme, "run/step-10", max_length=64, truncate_dim=4)
    assert wrapped.model is ullme
    assert wrapped.mteb_model_meta.name == "run/step-10"
    assert wrapped.max_length == 64
    assert wrapped.mteb_model_meta.embed_dim == 4
    task = mock("MockSTSTask")
    found = wrapped.encode([{"text": ["a"]}], task_metadata=task.metadata, hf_split="test", hf_subset="default")
    assert found.shape == (1, 4)
    with pytest.raises(ValueError, match="does not know the settings"):
        WrappedULLME.from_model(ullme, "x", max_len=3)


def test_max_length_cuts(tiny_llm):
    long = WrappedULLME(str(tiny_llm), device="cpu", max_length=8, prompts=Prompts(query="{text}"))
    task = mock("MockSTSTask")
    loader = [{"text": ["the cat sleeps " * 20, "the cat sleeps " * 30]}]
    first, second = long.encode(loader, task_metadata=task.metadata, hf_split="test", hf_subset="default")
    np.testing.assert_allclose(first, second, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["MockRetrievalTask", "MockRerankingTask", *SYMMETRIC])
def test_a_sentence_transformers_folder_scores_as_with_mteb_alone(tiny_sentence_transformer, name):
    import mteb
    from mteb.models.sentence_transformer_wrapper import SentenceTransformerEncoderWrapper

    wrapped = WrappedULLME(str(tiny_sentence_transformer), device="cpu")
    own = mteb.evaluate(
        SentenceTransformerEncoderWrapper(str(tiny_sentence_transformer), device="cpu"),
        mock(name),
        cache=None,
        co2_tracker=False,
        show_progress_bar=False,
    )
    assert evaluate(wrapped, mock(name)) == 100 * own[0].get_score()


def test_a_sentence_transformers_folder_has_its_own_prompts_on_each_side(tiny_sentence_transformer):
    from mteb.types import PromptType

    wrapped = WrappedULLME(str(tiny_sentence_transformer), device="cpu")
    encode = wrapped.model.encode
    task = mock("MockRetrievalTask").metadata
    text = "the old mill"

    def side(prompt_type):
        loader = mteb_loader([text], task, prompt_type)
        return wrapped.encode(loader, task_metadata=task, hf_split="test", hf_subset="default", prompt_type=prompt_type)

    query, passage = side(PromptType.query), side(PromptType.document)
    np.testing.assert_allclose(query, encode([f"find: {text}"]), atol=1e-6)
    np.testing.assert_allclose(passage, encode([f"text: {text}"]), atol=1e-6)
    assert np.abs(query - passage).max() > 1e-3


def mteb_loader(texts, metadata, prompt_type):
    from datasets import Dataset
    from mteb._create_dataloaders import create_dataloader

    return create_dataloader(
        Dataset.from_dict({"id": ["d0"], "text": texts}), task_metadata=metadata, prompt_type=prompt_type
    )


def test_a_sentence_transformers_folder_keeps_its_own_settings(tiny_sentence_transformer):
    path = str(tiny_sentence_transformer)
    with pytest.raises(ValueError, match=r"brings its own settings; leave out \['pooling', 'prompts'\]"):
        WrappedULLME(path, device="cpu", pooling="last", prompts=PROMPTS)
    plain, short = WrappedULLME(path, device="cpu"), WrappedULLME(path, device="cpu", max_length=7, truncate_dim=4)
    assert short.model.max_seq_length == 7
    assert short.model.encode(["a"]).shape == (1, 4)
    assert plain.mteb_model_meta.revision != short.mteb_model_meta.revision
    assert plain.mteb_model_meta.name == "local/tiny-st"


def test_user_errors():
    with pytest.raises(ValueError, match="both missing"):
        WrappedULLME()
    with pytest.raises(ValueError, match="max_length=0"):
        WrappedULLME("x", max_length=0)


def test_the_models_package_does_not_import_mteb():
    code = "import sys, ullme.models; ullme.models.ULLME; sys.exit('mteb' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("model_name", "checkpoint", "name"),
    [
        ("mistralai/Mistral-7B-v0.1", None, "mistralai/Mistral-7B-v0.1"),
        ("mistralai/Mistral-7B-v0.1", "runs/grl/checkpoints/last.ckpt", "mistralai/Mistral-7B-v0.1--grl-last"),
        ("gpt2", "runs/grl/step=5.ckpt", "local/gpt2--grl-step_5"),
    ],
)
def test_result_names(model_name, checkpoint, name):
    assert result_name(model_name, checkpoint) == name


def test_what_is_a_sentence_transformer(tmp_path, monkeypatch):
    import huggingface_hub

    embedder, llm = tmp_path / "embedder", tmp_path / "llm"
    embedder.mkdir()
    llm.mkdir()
    (embedder / "modules.json").touch()
    asked = []
    monkeypatch.setattr(huggingface_hub, "file_exists", lambda name, file: bool(asked.append(name)) or True)
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    assert is_sentence_transformer(str(embedder))
    assert not is_sentence_transformer(str(llm))
    assert not is_sentence_transformer("organisation/embedder")
    assert not is_sentence_transformer("not a / hub name")
    assert asked == []
    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    assert is_sentence_transformer("organisation/embedder")
    assert not is_sentence_transformer(str(llm))
    assert asked == ["organisation/embedder"]
