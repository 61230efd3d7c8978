"""A file of prompts becomes a file of answers: line by line, in batches, and where it stopped it goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from hippos.errors import ConfigError, HipposError, PromptError
from hippos.generate.engine import Generator
from hippos.generate.generated import Generated
from hippos.generate.sampling import Sampling
from hippos.generate.text import encode_prompt


@dataclass(frozen=True)
class BatchReport:
    """What `answer_file` did.

    Attributes:
        n_prompts: Prompts in the file, broken lines not counted.
        n_before: Prompts that had an answer already.
        n_answered: Prompts answered now.
        n_new_tokens: Tokens generated now.
        seed: Seed of the random numbers; each prompt has its own, by the number of its line.
        broken: Number (from 1) and error of each line that is no prompt.
    """

    n_prompts: int
    n_before: int
    n_answered: int
    n_new_tokens: int
    seed: int
    broken: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class _Prompt:
    line: int
    text: str
    ids: list[int]
    fields: dict[str, Any] = field(default_factory=dict)


def answer_file(
    generator: Generator,
    prompts: Path,
    answers: Path,
    sampling: Sampling,
    *,
    batch_size: int,
    on_progress: Callable[[int, int], object] = lambda done, total: None,
) -> BatchReport:
    """Continue each prompt of a file, and add the answers to another as they are finished.

    A line of prompts is a JSON object with a ``prompt``, whose other fields are copied to the answer, or a JSON string;
    blank lines are skipped. A line of answers is that object with ``line``, ``text``, ``finish_reason``,
    ``n_prompt_tokens``, ``n_new_tokens`` and ``seed``. If ``answers`` exists, only the lines without an answer are
    processed.

    Args:
        generator: A generator with a tokenizer.
        prompts: The file of prompts, UTF-8.
        answers: The file of answers.
        sampling: How tokens are chosen; without a seed, that of the existing answers.
        batch_size: Prompts per batch.
        on_progress: Called with the prompts done so far and all of them.

    Returns:
        What was done, and which lines were malformed.

    Raises:
        ConfigError: If ``answers`` holds something else than answers to these prompts, or of another seed or length.
        OutOfMemoryError: If a batch does not fit; the message names one that does, and the answers so far are kept.
        OSError: If a file cannot be read or written.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size must be at least 1, got {batch_size}")
    found, broken = _read_prompts(prompts, generator, sampling.max_new_tokens)
    done, seed = _read_answers(answers, found, sampling)
    sampling = replace(sampling, seed=seed)
    waiting = [prompt for prompt in found if prompt.line not in done]
    n_answered = n_tokens = 0
    on_progress(len(done), len(found))
    with answers.open("a", encoding="utf-8") as out:
        for start in range(0, len(waiting), batch_size):
            batch = waiting[start : start + batch_size]
            result = generator.generate([prompt.ids for prompt in batch], sampling, rows=[p.line for p in batch])
            sampling = replace(sampling, seed=result.seed)  # one for all batches
            _store(out, _answer_lines(batch, result))
            n_answered += len(batch)
            n_tokens += int(result.lengths.sum())
            on_progress(len(done) + n_answered, len(found))
    return BatchReport(len(found), len(done), n_answered, n_tokens, sampling.seed or 0, tuple(broken))


def _store(out: TextIO, lines: Iterable[str]) -> None:
    """Write lines so that a crash does not lose them; an error names the file, as a full disk's own does not."""
    try:
        out.writelines(lines)
        out.flush()
        os.fsync(out.fileno())
    except OSError as error:
        raise OSError(error.errno, error.strerror, out.name) from error


def _answer_lines(batch: list[_Prompt], result: Generated) -> Iterator[str]:
    texts = result.texts or ()
    for prompt, text, reason, n_new in zip(batch, texts, result.finish_reasons, result.lengths.tolist(), strict=True):
        answer = {
            **prompt.fields,
            "line": prompt.line,
            "prompt": prompt.text,
            "text": text,
            "finish_reason": reason,
            "n_prompt_tokens": len(prompt.ids),
            "n_new_tokens": n_new,
            "seed": result.seed,
        }
        yield json.dumps(answer, ensure_ascii=False) + "\n"


def _read_prompts(path: Path, generator: Generator, max_new_tokens: int) -> tuple[list[_Prompt], list[tuple[int, str]]]:
    found, broken = [], []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found.append(_read_prompt(number, line, generator, max_new_tokens))
            except (ValueError, HipposError) as error:
                broken.append((number, str(error)))
    return found, broken


def _read_prompt(number: int, line: bytes, generator: Generator, max_new_tokens: int) -> _Prompt:
    try:
        data = json.loads(line.decode("utf-8-sig"))  # some editors put a mark before the first line
    except UnicodeDecodeError as error:
        raise PromptError("not UTF-8 text") from error
    except ValueError as error:
        raise PromptError(f"not JSON: {error}") from error
    fields = dict(data) if isinstance(data, dict) else {}
    text = fields.pop("prompt", None) if isinstance(data, dict) else data
    if not isinstance(text, str):
        raise PromptError('neither an object with a "prompt" that is a text, nor a text')
    ids = encode_prompt(generator.tokenizer, text, generator.model.config.get_text_config().vocab_size)
    generator.check_length(len(ids), max_new_tokens)
    return _Prompt(number, text, ids, fields)


def _read_answers(path: Path, prompts: list[_Prompt], sampling: Sampling) -> tuple[set[int], int | None]:
    """The lines that have an answer, and the seed to go on with; a torn last line is cut off."""
    seed = sampling.seed
    if not path.exists():
        return set(), seed
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    by_line = {prompt.line: prompt.text for prompt in prompts}
    done: set[int] = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        where = f"{path} line {number}"
        try:
            answer = json.loads(line.decode("utf-8"))
            key, text, its_seed = answer["line"], answer["prompt"], answer["seed"]
            n_new, reason = answer["n_new_tokens"], answer["finish_reason"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{where} is no answer of hippos; choose another file for the answers") from error
        if by_line.get(key) != text:
            raise ConfigError(
                f"{where} answers another prompt than line {key} asks; choose another file for the answers"
            )
        if seed is not None and its_seed != seed:
            raise ConfigError(f"{where} was written with seed {its_seed}, not {seed}; choose another file or that seed")
        if n_new > sampling.max_new_tokens or (reason == "length" and n_new != sampling.max_new_tokens):
            raise ConfigError(
                f"{where} ends after {n_new} tokens, wanted are {sampling.max_new_tokens}; choose another file or that "
                "number"
            )
        seed = its_seed
        done.add(key)
    if len(whole) < len(content):
        with path.open("rb+") as file:
            file.truncate(len(whole))
    return done, seed
