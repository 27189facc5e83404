"""Texts in their templates: which tokens are pooled; and token rows of different lengths as one block."""

from __future__ import annotations

import copy
from functools import cache

import pytest
from tiny import TEXTS, make_tokenizer
from tokenizers.decoders import ByteLevel

from ullme.prompts import Prompts, PromptTokenizer, begin_and_end, pad_rows
from ullme.token_rows import TokenRows


@pytest.mark.parametrize(
    ("rows", "ids", "mask"),
    [
        ([[1], [2, 3], []], [[1, 9], [2, 3], [9, 9]], [[1, 0], [1, 1], [0, 0]]),
        ([[9, 9]], [[9, 9]], [[1, 1]]),  # a real token may look like padding
        ([[]], [[]], [[]]),
    ],
)
def test_padding_on_the_right(rows, ids, mask):
    block = pad_rows(rows, 9)
    assert block.input_ids.tolist() == ids
    assert block.attention_mask.tolist() == mask
    assert str(block.input_ids.dtype) == str(block.attention_mask.dtype) == "torch.int64"


def test_no_rows():
    assert pad_rows([], 0).input_ids.shape == (0, 0)


def read(ids) -> str:
    return ByteLevel().decode(make_tokenizer().convert_ids_to_tokens([int(n) for n in ids]))


def pooled_text(prompts: Prompts, text: str, role: str = "query", **options) -> tuple[str, str]:
    """What a text's row says, and the part of it that is pooled."""
    tokenizer = make_tokenizer()
    rows = PromptTokenizer(tokenizer, prompts)([text, "a far longer text beside it"], role, max_length=64, **options)
    ids, pooled = rows.input_ids[0], rows.pooled[0].bool()
    return read(ids[rows.attention_mask[0].bool()]), read(ids[pooled])


@pytest.mark.parametrize(
    ("template", "whole", "pooled"),
    [
        ("Instruct: do\nQuery: {text}", "<s>Instruct: do\nQuery: the mill</s>", " the mill</s>"),
        ("<|do|>{text}<|embed|>", "<s><|do|>the mill<|embed|></s>", "the mill<|embed|></s>"),
        ("{text}", "<s>the mill</s>", "the mill</s>"),  # the begin token is no part of the text
        ("Say: {text} again: {text}!", "<s>Say: the mill again: the mill!</s>", " the mill!</s>"),
    ],
)
def test_the_text_and_what_follows_is_pooled(template, whole, pooled):
    # a token may begin with the space in front of the text
    found = pooled_text(Prompts(query=template, append_eos=True, pooled="text"), "the mill")
    assert (found[0], found[1].strip()) == (whole, pooled.strip())
    everything = pooled_text(Prompts(query=template, append_eos=True), "the mill")
    assert everything == (whole, whole)


def test_the_span_follows_each_rows_own_instruction():
    tokenizer = make_tokenizer()
    prompts = PromptTokenizer(tokenizer, Prompts(query="{instruction}|{text}", pooled="text"))
    rows = prompts(["mill", "mill"], "query", max_length=64, instruction=["a", "a much longer instruction"])
    assert [read(i[m.bool()]) for i, m in zip(rows.input_ids, rows.pool_mask, strict=True)] == ["mill"] * 2
    assert rows.pool_mask.argmax(1).tolist() == [
        len(tokenizer("a|")["input_ids"]),
        len(tokenizer("a much longer instruction|")["input_ids"]),
    ]


def test_text_that_looks_like_the_template_and_many_byte_characters():
    found = pooled_text(Prompts(query="Q: {text}", pooled="text"), "Q: Q: ü日本 {text}")
    assert found[1].strip() == "Q: Q: ü日本 {text}"


def test_both_copies_of_a_long_text_lose_the_same():
    tokenizer = make_tokenizer()
    text = " ".join(f"word{n}" for n in range(60))
    prompts = Prompts(query="Say {text} again {text}.", append_eos=True, pooled="text")
    rows, starts = PromptTokenizer(tokenizer, prompts).rows([text, "short"], "query", max_length=50)
    assert 44 <= len(rows[0]) <= 50
    decoded = read(rows[0])
    first, second = decoded.removeprefix("<s>Say ").removesuffix(".</s>").split(" again ")
    assert first == second
    assert text.startswith(first)
    assert read(rows[0][starts[0] :]).strip() == f"{second}.</s>"
    assert read(rows[1]) == "<s>Say short again short.</s>"


def test_a_long_text_keeps_its_span():
    tokenizer = make_tokenizer()
    prompts = PromptTokenizer(tokenizer, Prompts(query="Instruct: x\nQuery: {text} end", pooled="text"))
    rows, starts = prompts.rows(["mill " * 80, ""], "query", max_length=40)
    head = len(tokenizer("Instruct: x\nQuery:")["input_ids"])
    assert len(rows[0]) == 40
    assert starts[0] in (head, head + 1)
    assert 0 < starts[1] < len(rows[1])  # an empty text: what stands behind it


def test_a_long_text_loses_its_own_end_with_sentencepiece_too():
    """Whose tokenizers begin every text with ▁, what a template puts behind a text as well if it is read alone."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<pad>", "</s>", "▁", "\n", ":", *"abcdefghijklmnopqrstuvwxyz"]
    llama = Tokenizer(models.BPE({letter: n for n, letter in enumerate(letters)}, [], unk_token="<unk>"))
    llama.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=llama, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    assert tokenizer.tokenize("\na:") == ["▁", "\n", "a", ":"]
    rows = PromptTokenizer(tokenizer, Prompts(generation="q:{text}\na:")).prompt_ids(["bcdefz"], max_length=9)
    assert tokenizer.convert_ids_to_tokens(rows[0]) == [*"▁q:bcd", "\n", "a", ":"]


def test_each_text_may_have_a_length_of_its_own():
    prompts = PromptTokenizer(make_tokenizer(), Prompts())
    rows = prompts.ids(["mill " * 9] * 2, "passage", max_length=[5, 8])
    assert list(map(len, rows)) == [5, 8]
    assert rows[0] == rows[1][:5]


def test_an_empty_text_without_anything_behind_pools_its_last_token():
    prompts = PromptTokenizer(make_tokenizer(), Prompts(query="Query:{text}", pooled="text"))
    rows, starts = prompts.rows([""], "query", max_length=40)
    assert starts == [len(rows[0]) - 1]


def test_bare_texts_and_generation_prompts_are_pooled_whole():
    prompts = PromptTokenizer(make_tokenizer(), Prompts(pooled="text"))
    assert prompts(["a"], None, max_length=9).pool_mask is None
    assert prompts.rows(["a"], "generation", max_length=99)[1] is None


def test_a_tokenizer_without_offsets_is_refused():
    from transformers import ByT5Tokenizer

    with pytest.raises(ValueError, match=r"prompts\.pooled=text needs a tokenizer"):
        PromptTokenizer(ByT5Tokenizer(), Prompts(pooled="text"))(["a"], "query", max_length=99)


def test_rows_travel_with_their_span():
    rows = pad_rows([[1, 2, 3], [4, 5]], 0, [1, 0])
    other = pad_rows([[6, 7, 8, 9]], 0)
    both = TokenRows.cat([rows, other])
    assert both.pool_mask.tolist() == [[0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert both[1:].pool_mask.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert both.to("cpu").pool_mask.tolist() == both.pool_mask.tolist()
    assert TokenRows.cat([other, other]).pool_mask is None


@pytest.mark.parametrize("append_eos", [False, True])
def test_an_end_token_of_the_template_is_kept_once(append_eos):
    """Cut like a text without it, and the end token behind: its tail and the end token are the same token."""
    text = " ".join(TEXTS)
    bare = PromptTokenizer(make_tokenizer(), Prompts(query="q: {text}")).ids([text], "query", max_length=19)[0]
    prompts = Prompts(query="q: {text}</s>", append_eos=append_eos)
    assert PromptTokenizer(make_tokenizer(), prompts).ids([text], "query", max_length=20)[0] == [*bare, 2]


# What a tokenizer puts around a text -> its template; eos_token is </s> (2) in all of them.
FRAMES = {
    "nothing": "$A",
    "begin": "<s> $A",
    "another end": "$A <pad>",
    "begin and another end": "<s> $A <pad>",
    "own end": "$A </s>",
    "two before and two after": "<pad> <s> $A </s> <pad>",
}
NUMBERS = {"<pad>": 0, "<s>": 1, "</s>": 2}


@cache
def framing_tokenizer(frame: str):
    from tokenizers import processors

    tokenizer = copy.deepcopy(make_tokenizer())
    template = processors.TemplateProcessing(single=FRAMES[frame], special_tokens=list(NUMBERS.items()))
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def frame_of(frame: str) -> tuple[list[int], list[int]]:
    before, after = FRAMES[frame].split("$A")
    return [NUMBERS[token] for token in before.split()], [NUMBERS[token] for token in after.split()]


def bare(text: str) -> list[int]:
    return make_tokenizer()(text, add_special_tokens=False)["input_ids"]


LONG = " ".join(TEXTS)


@pytest.mark.parametrize("frame", FRAMES)
class TestWhatATokenizerPutsAroundATextByItself:
    def test_is_found(self, frame):
        assert begin_and_end(framing_tokenizer(frame)) == frame_of(frame)

    @pytest.mark.parametrize("append_eos", [False, True])
    @pytest.mark.parametrize("max_length", [14, 400])
    def test_long_and_short_texts_begin_and_end_alike(self, frame, append_eos, max_length):
        before, after = frame_of(frame)
        after = after or [2] * append_eos
        prompts = PromptTokenizer(framing_tokenizer(frame), Prompts(query="q:{text}. {text}!", append_eos=append_eos))
        (row,) = prompts.ids([LONG], None, max_length=max_length)
        room = max_length - len(before) - len(after)
        assert (len(bare(LONG)) > room) == (max_length == 14)
        assert row == [*before, *bare(LONG)[:room], *after]
        (row,) = prompts.ids([LONG], "query", max_length=max_length)
        body = row[len(before) : len(row) - len(after)]
        assert row == [*before, *body, *after]
        assert len(row) <= max_length
        assert read(body).startswith("q:")
        assert read(body).endswith("!")

    @pytest.mark.parametrize("role", ["generation", "query_generation"])
    @pytest.mark.parametrize("append_eos", [False, True])
    @pytest.mark.parametrize("end", ["", "</s>", "<pad>"])
    def test_a_prompt_of_generation_is_open(self, frame, role, append_eos, end):
        """The end that a template of generation has itself is the tokenizer's, too, and goes; another token stays."""
        before, after = frame_of(frame)
        kept = [] if not end or [NUMBERS[end]] == (after or [2])[:1] else [NUMBERS[end]]
        templates = {"generation": f"q:{{text}} p:{end}", "query_generation": f"q:{{passage}} p:{end}{{query}}"}
        prompts = PromptTokenizer(framing_tokenizer(frame), Prompts(**templates, append_eos=append_eos))
        assert prompts.prompt_ids(["mill"], max_length=99, role=role) == [[*before, *bare("q:mill p:"), *kept]]
        (cut,) = prompts.prompt_ids([LONG], max_length=16, role=role)
        tail = [*bare(" p:"), *kept]
        assert cut == [*before, *bare(f"q:{LONG}")[: 16 - len(before) - len(tail)], *tail]

    def test_a_cut_text_keeps_the_whole_end_of_its_template(self, frame):
        before, after = frame_of(frame)
        prompts = PromptTokenizer(framing_tokenizer(frame), Prompts(passage="{text} is the text"))
        (row,) = prompts.ids([LONG], "passage", max_length=30)
        tail = [*bare(" is the text"), *after]
        assert row == [*before, *bare(LONG)[: 30 - len(before) - len(tail)], *tail]

    @pytest.mark.parametrize("append_eos", [False, True])
    def test_a_template_that_spells_it_out_has_it_once(self, frame, append_eos):
        before, after = FRAMES[frame].replace(" ", "").split("$A")
        spelt = Prompts(query=f"{before}q: {{text}}{after}", append_eos=append_eos)
        left_out = Prompts(query="q: {text}", append_eos=append_eos)
        for text in ("mill", LONG):
            rows = [
                PromptTokenizer(framing_tokenizer(frame), prompts).rows([text], "query", max_length=30)
                for prompts in (spelt, left_out)
            ]
            assert rows[0] == rows[1]

    def test_the_pooled_span_begins_at_the_text(self, frame):
        before, _ = frame_of(frame)
        prompts = PromptTokenizer(framing_tokenizer(frame), Prompts(query="q:\n{text}", pooled="text"))
        _, starts = prompts.rows(["mill", LONG], "query", max_length=30)
        assert starts == [len(before) + len(bare("q:\n"))] * 2


@pytest.mark.parametrize(
    ("templates", "message"),
    [
        ({"query": "\n<s>q: {text}"}, r"prompts.query has white space outside of '<s>' \('\\n<s>q: '\)"),
        ({"passage": "{text}<pad>\n"}, "prompts.passage has white space outside of '<pad>'"),
        ({"generation": " {instruction} {text}", "instruction": "<s>do"}, "prompts.generation has white space"),
        ({"query_generation": " <s>{passage}{query}"}, "prompts.query_generation has white space outside of '<s>'"),
    ],
)
def test_white_space_outside_of_a_begin_or_end_token_is_refused(templates, message):
    """Such a row would have the token twice."""
    tokenizer = framing_tokenizer("begin and another end")
    with pytest.raises(ValueError, match=message):
        PromptTokenizer(tokenizer, Prompts(**templates))
    PromptTokenizer(framing_tokenizer("nothing"), Prompts(**templates))  # which puts nothing there by itself


def test_an_end_token_and_white_space_may_end_a_prompt_of_generation():
    """It gets no end token by itself."""
    prompts = PromptTokenizer(framing_tokenizer("own end"), Prompts(query_generation="{passage}</s>\n{query}"))
    (row,) = prompts.prompt_ids(["mill"], max_length=99, role="query_generation")
    assert row == [*bare("mill"), 2, *bare("\n")]


def test_the_last_token_that_is_pooled_is_the_same_for_long_and_short_texts():
    prompts = PromptTokenizer(framing_tokenizer("another end"), Prompts(append_eos=True))
    rows = prompts(["mill", LONG], "passage", max_length=20)
    assert rows.attention_mask.sum(1).tolist() == [len(bare("mill")) + 1, 20]
    assert [row[mask.bool()][-1] for row, mask in zip(rows.input_ids, rows.attention_mask, strict=True)] == [0, 0]


def test_a_passage_that_is_scored_ends_where_the_llm_stops_generating():
    prompts = PromptTokenizer(framing_tokenizer("another end"), Prompts())
    assert prompts.target_ids(["mill", LONG], max_length=20) == [[*bare("mill"), 2], bare(LONG)[:20]]


def test_a_passage_that_is_scored_ends_in_the_tokenizers_own_end_where_there_is_no_eos_token():
    tokenizer = framing_tokenizer("another end")
    tokenizer.eos_token = None
    assert PromptTokenizer(tokenizer, Prompts()).target_ids(["mill"], max_length=20) == [[*bare("mill"), 0]]


def test_an_end_token_that_there_is_not_cannot_be_appended():
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"append_eos=true, and .* has no eos_token and ends no text by itself"):
        PromptTokenizer(tokenizer, Prompts(append_eos=True))
    other = framing_tokenizer("another end")
    other.eos_token = None
    assert PromptTokenizer(other, Prompts(append_eos=True)).ids(["mill"], "passage", max_length=20) == [
        [*bare("mill"), 0]
    ]


def test_a_tokenizer_that_reads_few_texts_is_asked_about_one_of_them():
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab={"</s>": 0, "水": 1}, merges=[]))
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    assert tokenizer("a1", add_special_tokens=False)["input_ids"] == []
    assert begin_and_end(tokenizer) == ([], [0])


def test_a_tokenizer_that_cannot_be_read_without_its_frame_is_refused():
    class Mixing:
        all_special_tokens: tuple[str, ...] = ()
        get_vocab = dict

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1, 2] if add_special_tokens else [3]}

    with pytest.raises(ValueError, match=r"Mixing reads 'a' as \[1, 2\], and as \[3\]"):
        begin_and_end(Mixing())
