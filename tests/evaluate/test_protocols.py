"""Which tokens are predicted from which, and what their sum is divided by."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linearize.errors import RefusedError, UsageError
from linearize.evaluate.protocols import (
    Protocol,
    detokenize,
    encode,
    make_task,
    parse_protocol,
    rolling_rows,
    split_pages,
)

BOS, EOS = 256, 257
TEXTS = ["héllo wörld ", " 東京  is\n\tbig", "x"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory, build_llama: Any) -> Any:
    """One token a byte, so that counts can be made by hand."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(build_llama(tmp_path_factory.mktemp("llama")))


def task(text: str, texts: list[str], tokenizer: Any, **kwargs: Any) -> Any:
    return make_task(parse_protocol(text, context=None, default_context=8), texts, tokenizer, **kwargs)


def test_parse() -> None:
    def parse(text: str | None, context: int | None = None) -> str:
        return str(parse_protocol(text, context=context, default_context=1024))

    assert parse(None) == "concat@1024"
    assert parse(None, 256) == parse("concat", 256) == parse("concat@256") == parse("concat@256", 256) == "concat@256"
    assert parse("documents@7") == "documents@7"
    assert parse("lm-eval/wikitext") == "lm-eval/wikitext@1024"
    assert parse("lm-eval/wikitext@512+single-bos") == "lm-eval/wikitext@512+single-bos"
    assert parse("concat+eos") == "concat@1024+eos"
    for bad, message in (
        ("concatt@5", "unknown protocol 'concatt@5'. Did you mean 'concat'"),
        ("concat@", "unknown protocol"),
        ("concat@0", "at least 2 tokens"),
        ("concat@1", "at least 2 tokens"),
        ("documents+eos", "has no variant 'eos'"),
        ("lm-eval/wikitext+single_bos", "no variant 'single_bos'"),
    ):
        with pytest.raises(UsageError, match=re.escape(message)):
            parse(bad)
    with pytest.raises(UsageError, match="Give one of them"):
        parse("concat@512", 256)


def test_counts_lie_under_their_tokens_and_add_up(tokenizer: Any) -> None:
    ids, sizes = encode(TEXTS, tokenizer)
    assert sizes is not None
    for text, tokens, size in zip(TEXTS, ids, sizes):
        assert len(tokens) == len(size) == len(text.encode())
        assert size.sum(axis=0).tolist() == [len(text.split()), len(text.encode())]
    starts = [i for i, n in enumerate(sizes[0][:, 0]) if n]
    assert starts == [0, 7]  # h, and w after six bytes of héllo and a space


def test_counts_of_a_real_vocabulary_add_up(shared: Path) -> None:
    from transformers import AutoTokenizer

    for name in ("stories260k", "llama-25m"):
        tokenizer = AutoTokenizer.from_pretrained(shared / "teachers" / name)
        _, sizes = encode(TEXTS, tokenizer)
        assert sizes is not None
        for text, size in zip(TEXTS, sizes):
            assert size.sum(axis=0).tolist() == [len(text.split()), len(text.encode())]
            assert (size >= 0).all()


def test_concat_by_hand(tokenizer: Any) -> None:
    made = task("concat@4", ["abc d", "ef"], tokenizer)
    rows = [r.tokens.tolist() for r in made.rows]
    a, b, c, d, e, f, space = (tokenizer.encode(x, add_special_tokens=False)[0] for x in "abcdef ")
    assert rows == [[BOS, a, b, c], [space, d, BOS, e]]
    assert [r.scored for r in made.rows] == [3, 3]
    # Scored: a b c | d BOS e. The space opens a window and is not predicted; BOS is, and is no text.
    assert (made.tokens, made.bytes, made.words) == (6, 5, 3)
    assert (made.bos, made.eos) == ("before each document", "none")
    eos = task("concat@4+eos", ["abc d", "ef"], tokenizer)
    assert [r.tokens.tolist() for r in eos.rows] == [[a, b, c, space], [d, EOS, e, f]]
    assert (eos.bos, eos.eos) == ("none", "after each document")
    plain = task("concat@4+plain", ["abc d", "ef"], tokenizer)
    assert [r.tokens.tolist() for r in plain.rows] == [[a, b, c, space]]


def test_concat_marks_with_eos_where_there_is_no_bos(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    from transformers import AutoTokenizer

    without = AutoTokenizer.from_pretrained(tmp_path, bos_token=None)
    made = task("concat@3", ["ab", "cd"], without)
    assert made.rows[0].tokens.tolist()[-1] == EOS
    assert (made.bos, made.eos) == ("none", "after each document")


def test_max_windows_takes_the_first(tokenizer: Any) -> None:
    whole = task("concat@8", ["abc def " * 50], tokenizer)
    some = task("concat@8", ["abc def " * 50], tokenizer, max_windows=3)
    assert len(some.rows) == 3 < len(whole.rows)
    assert all(np.array_equal(a.tokens, b.tokens) for a, b in zip(some.rows, whole.rows))
    assert some.bytes == 24 - 1 - 2  # 24 tokens, BOS among them, and 3 first ones not scored (one of them BOS)
    with pytest.raises(UsageError, match="not positive"):
        task("concat@8", ["abc"], tokenizer, max_windows=0)


def test_documents_by_hand(tokenizer: Any) -> None:
    made = task("documents@4", ["abcdef", "g", " hi"], tokenizer)
    assert [(len(r.tokens), r.scored) for r in made.rows] == [(4, 3), (2, 1), (4, 3)]
    assert all(r.tokens[0] == BOS for r in made.rows)
    assert (made.tokens, made.bytes, made.words) == (7, 7, 3)


def test_too_little_text_is_refused_in_one_line(tokenizer: Any) -> None:
    with pytest.raises(RefusedError, match="text is shorter than one context: 4 tokens, needs 64") as caught:
        task("concat@64", ["abc"], tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", [0, 1, 2, 6, 7, 8, 13, 14, 15, 40])
@pytest.mark.parametrize("context", [2, 7])
def test_rolling_rows_predict_every_token_once_with_the_context_they_should(length: int, context: int) -> None:
    ids = list(range(100, 100 + length))
    rows = rolling_rows(ids, 1, context)
    assert [t for r in rows for t in r.tokens[len(r.tokens) - r.scored :]] == ids
    for number, row in enumerate(rows):
        assert len(row.tokens) <= context + 1
        assert row.tokens[0] == 1 if number == 0 else len(row.tokens) == context + 1
        stream = [1, *ids]
        begin = stream.index(row.tokens[0])
        assert row.tokens.tolist() == stream[begin : begin + len(row.tokens)]


RAW = " \n = One = \n \n First page . \n = = Part = = \n more \n \n = Two = \n \n Second ( page ) \n"


def test_pages_begin_at_titles_not_at_sections() -> None:
    pages = split_pages(RAW)
    assert pages == [
        " = One = \n \n First page . \n = = Part = = \n more \n ",
        " = Two = \n \n Second ( page ) \n",
    ]
    assert split_pages("no title") == ["no title"]


@pytest.mark.parametrize(
    "spaced, plain",
    [
        ("a @-@ b 1 @,@ 000 3 @.@ 5", "a-b 1,000 3.5"),
        ("yes , no ; maybe : so . He ! ? end .\n", "yes, no; maybe: so. He!? end .\n"),
        ("( inside ) [ x ] { y }", "(inside) [x] {y}"),
        ('a " quoted " word', 'a "quoted" word'),
        ("Teddy 's Story , the boys ' room", "Teddy's Story, the boys' room"),
        (" = = Part = = \n text \n", " == Part ==\ntext\n"),
        ("20 \u00b0 N of", "20\u00b0N of"),
    ],
)
def test_detokenize(spaced: str, plain: str) -> None:
    assert detokenize(spaced) == plain


def test_detokenizer_and_windows_equal_the_harness(shared: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from lm_eval.tasks.wikitext.preprocess_wikitext import process_results, wikitext_detokenizer
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    pages = split_pages((shared / "data" / "wikitext2-raw-test.txt").read_bytes().decode())
    assert len(pages) == 62
    assert all(detokenize(p) == wikitext_detokenizer({"page": p}) for p in pages)
    counts = [process_results({"page": p}, (0.0,)) for p in pages]
    assert sum(c["word_perplexity"][1] for c in counts) == 241_335
    for length in (1, 2, 7, 8, 9, 30):
        theirs = get_rolling_token_windows(list(range(50, 50 + length)), 1, 8, 1)
        ours = rolling_rows(range(50, 50 + length), 1, 8)
        assert [(a + b, len(b)) for a, b in map(make_disjoint_window, theirs)] == [
            (r.tokens.tolist(), r.scored) for r in ours
        ]


def test_wikitext_counts_words_and_bytes_of_the_page_before_detokenising(tokenizer: Any) -> None:
    pages = split_pages(RAW)
    made = task("lm-eval/wikitext@16", [RAW], tokenizer)
    assert made.words == sum(len(re.split(r"\s+", p)) for p in pages)
    assert made.bytes == sum(len(p.encode()) for p in pages)
    assert made.tokens == sum(len(detokenize(p).encode()) for p in pages)
    assert made.bos == "single"  # this tokenizer adds no BOS of its own
    with pytest.raises(UsageError, match=r"raw file, one .txt; this data holds 2 documents"):
        task("lm-eval/wikitext", ["a", "b"], tokenizer)
    with pytest.raises(UsageError, match="max_windows has no meaning"):
        task("lm-eval/wikitext", [RAW], tokenizer, max_windows=2)


def test_single_bos_drops_the_second_one(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "teachers" / "stories260k")
    raw = (shared / "data" / "wikitext2-raw-test.txt").read_bytes().decode()
    double = make_task(Protocol(name="lm-eval/wikitext", context=512), [raw], tokenizer)
    single = make_task(Protocol(name="lm-eval/wikitext", context=512, option="single-bos"), [raw], tokenizer)
    assert (double.bos, double.tokens, double.words, double.bytes) == ("double", 766_012, 241_335, 1_290_527)
    assert (single.bos, single.tokens) == ("single", 765_950)
