"""Text in, token blocks out: corpora, tokenizers, packing, and the order in which blocks are read."""

from __future__ import annotations

from hippos.data.blocks import BlockOrder, StepBatches, TokenBlocks, collate_blocks, collate_documents, micro_batch_rows
from hippos.data.corpus import Corpus, DatasetCorpus, FileCorpus, Part, split_corpus
from hippos.data.documents import END_OF_TEXT, read_documents
from hippos.data.opening import open_corpus
from hippos.data.packing import PackedTokens, pack, pack_in_memory
from hippos.data.stdlib import stdlib_corpus
from hippos.data.stream import DocumentStream, StreamBatches, merge_positions, take_head
from hippos.data.tokenizer import load_tokenizer, train_tokenizer

__all__ = [
    "END_OF_TEXT",
    "BlockOrder",
    "Corpus",
    "DatasetCorpus",
    "DocumentStream",
    "FileCorpus",
    "PackedTokens",
    "Part",
    "StepBatches",
    "StreamBatches",
    "TokenBlocks",
    "collate_blocks",
    "collate_documents",
    "load_tokenizer",
    "merge_positions",
    "micro_batch_rows",
    "open_corpus",
    "pack",
    "pack_in_memory",
    "read_documents",
    "split_corpus",
    "stdlib_corpus",
    "take_head",
    "train_tokenizer",
]
