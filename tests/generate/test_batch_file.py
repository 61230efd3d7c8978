from __future__ import annotations

import errno
import json
import os

import pytest

from hippos.errors import ConfigError, OutOfMemoryError
from hippos.generate import Generator, Sampling, answer_file

SAMPLING = Sampling(max_new_tokens=6, temperature=1.0, seed=4)
ANSWER = {"line": 1, "prompt": "hello", "seed": 4, "n_new_tokens": 6, "finish_reason": "length"}


@pytest.fixture
def writer(random_h3, tokenizer):
    return Generator(random_h3.double(), tokenizer)


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = ['\ufeff{"prompt": "hello", "id": 7}', '"just a text"', "", '{"prompt": "h\u00e9"}', '{"prompt": "abc"}']
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_prompt_gets_its_answer(writer, prompts, tmp_path):
    seen = []
    out = tmp_path / "answers.jsonl"
    report = answer_file(
        writer, prompts, out, SAMPLING, batch_size=2, on_progress=lambda done, total: seen.append((done, total))
    )
    answers = read(out)
    assert [(answer["line"], answer["prompt"]) for answer in answers] == [
        (1, "hello"),
        (2, "just a text"),
        (4, "h\u00e9"),
        (5, "abc"),
    ]
    assert answers[0]["id"] == 7
    assert (report.n_prompts, report.n_before, report.n_answered, report.broken) == (4, 0, 4, ())
    assert report.n_new_tokens == sum(answer["n_new_tokens"] for answer in answers)
    assert seen == [(0, 4), (2, 4), (4, 4)]
    alone = writer.generate([writer.tokenizer("abc")["input_ids"]], SAMPLING, rows=[5])
    assert answers[3]["text"] == alone.texts[0]


def test_it_goes_on_where_it_stopped(writer, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    answer_file(writer, prompts, out, SAMPLING, batch_size=3)
    whole = out.read_text(encoding="utf-8")
    lines = whole.splitlines(keepends=True)
    for kept in ("", lines[0], lines[0] + lines[1][:9], "".join(lines[:3]), whole):
        out.write_text(kept, encoding="utf-8")
        report = answer_file(writer, prompts, out, SAMPLING, batch_size=3)
        assert out.read_text(encoding="utf-8") == whole
        assert report.n_before == kept.count("\n")
        assert report.n_before + report.n_answered == 4


def test_a_drawn_seed_is_kept_for_the_rest(writer, prompts, tmp_path):
    out = tmp_path / "answers.jsonl"
    free = Sampling(max_new_tokens=6)
    report = answer_file(writer, prompts, out, free, batch_size=1)
    assert {answer["seed"] for answer in read(out)} == {report.seed}
    whole = out.read_text(encoding="utf-8")
    out.write_text(whole.splitlines(keepends=True)[0], encoding="utf-8")
    answer_file(writer, prompts, out, free, batch_size=3)
    assert out.read_text(encoding="utf-8") == whole


def test_broken_lines_are_told_by_number_and_the_others_done(writer, tmp_path):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    lines = [b'{"prompt": "a"}', b"{", b"\xff", b"7", b'{"text": "a"}', b'{"prompt": ""}', b'{"prompt": "b"}']
    path.write_bytes(b"\n".join(lines))
    report = answer_file(writer, path, out, SAMPLING, batch_size=4)
    assert [answer["line"] for answer in read(out)] == [1, 7]
    assert [number for number, _ in report.broken] == [2, 3, 4, 5, 6]
    faults = dict(report.broken)
    assert faults[2].startswith("not JSON")
    assert faults[3] == "not UTF-8 text"
    assert '"prompt"' in faults[4]
    assert "makes no token" in faults[6]


def test_a_prompt_longer_than_the_cache_is_a_broken_line(random_h3, tokenizer, tmp_path):
    path, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    path.write_text('"short"\n"%s"\n' % ("long" * 20))
    report = answer_file(Generator(random_h3, tokenizer, context=32), path, out, SAMPLING, batch_size=4)
    assert [answer["line"] for answer in read(out)] == [1]
    assert report.broken[0][0] == 2
    assert "has room for 32" in report.broken[0][1]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("not json\n", "line 1 is no answer of hippos"),
        ('{"line": 1}\n', "line 1 is no answer of hippos"),
        (ANSWER | {"prompt": "other"}, "answers another prompt than line 1 asks"),
        (ANSWER | {"line": 9}, "answers another prompt than line 9 asks"),
        (ANSWER | {"seed": 5}, "was written with seed 5, not 4"),
        (ANSWER | {"n_new_tokens": 5}, "ends after 5 tokens, wanted are 6"),
        (ANSWER | {"n_new_tokens": 7, "finish_reason": "eos"}, "ends after 7 tokens, wanted are 6"),
    ],
)
def test_answers_to_something_else_are_not_added_to(writer, prompts, tmp_path, content, words):
    out = tmp_path / "answers.jsonl"
    content = content if isinstance(content, str) else json.dumps(content) + "\n"
    out.write_text(content)
    with pytest.raises(ConfigError, match=words):
        answer_file(writer, prompts, out, SAMPLING, batch_size=2)
    assert out.read_text() == content


def test_out_of_memory_loses_nothing(writer, prompts, tmp_path, monkeypatch):
    out = tmp_path / "answers.jsonl"
    answer_file(writer, prompts, out, SAMPLING, batch_size=1)
    first = out.read_text(encoding="utf-8").splitlines(keepends=True)[0]
    out.write_text(first, encoding="utf-8")
    monkeypatch.setattr("hippos.generate.memory.free_bytes", lambda device: 1000)
    with pytest.raises(OutOfMemoryError, match="out of memory on cpu: 3 texts"):
        answer_file(Generator(writer.model, writer.tokenizer), prompts, out, SAMPLING, batch_size=3)
    assert out.read_text(encoding="utf-8") == first


def test_a_full_disk_names_the_file(writer, prompts, tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    out = tmp_path / "answers.jsonl"
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*answers\.jsonl'"):
            answer_file(writer, prompts, out, SAMPLING, batch_size=2)
    assert answer_file(writer, prompts, out, SAMPLING, batch_size=2).n_before == 2
