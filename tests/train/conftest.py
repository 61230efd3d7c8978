"""A text and a model small enough that a whole run takes a second."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from hippos.train import DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig, TrainResult, train
from tests.train.left import QUIET

_WORDS = (
    "state",
    "space",
    "model",
    "hippo",
    "shift",
    "gate",
    "filter",
    "token",
    "chunk",
    "scan",
    "recall",
    "the",
    "of",
)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HIPPOS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty documents of random words, the same in every session."""
    draw = random.Random(7)
    documents = []
    for _ in range(40):
        lines = [" ".join(draw.choices(_WORDS, k=draw.randint(3, 9))) for _ in range(draw.randint(2, 12))]
        documents.append("\n".join(lines) + "\n")
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("<|endoftext|>\n".join(documents))
    return path


@pytest.fixture(scope="session")
def tiny(text_file: Path) -> TrainConfig:
    """A hybrid of two layers with dropout, so that a wrong random state shows, over twelve steps."""
    return TrainConfig(
        recipe="tiny",
        model=ModelConfig(
            changes={
                "hidden_size": 16,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "attn_layers": (1,),
                "state_size": 4,
                "embedding_dropout": 0.1,
                "residual_dropout": 0.1,
                "attention_dropout": 0.1,
            }
        ),
        data=DataConfig(corpus=(str(text_file),), tokenizer="bpe:300", seqlen=24),
        optim=OptimConfig(steps=12, batch_size=4, micro_batch_size=2, learning_rate=1e-2, warmup=0.2),
        run=RunConfig(log_steps=3, eval_steps=4, eval_tokens=200, save_steps=2, tensorboard=False),
    )


@pytest.fixture(scope="session")
def finished(tiny: TrainConfig, tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run of `tiny` that went to its end; tests leave its folder as it is."""
    return train(tiny, tmp_path_factory.mktemp("runs") / "finished", progress=QUIET)
