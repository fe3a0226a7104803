"""A SentencePiece tokenizer for chats, trained in seconds and saved as a Hugging Face tokenizer."""

from __future__ import annotations

import io
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

PAD, BEGIN, END, UNKNOWN = "<|pad|>", "<|begin|>", "<|end|>", "<|unknown|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role == 'assistant' -%}
        {{- '<|assistant|>' -}}
        {%- generation -%}
            {{- message.content + '<|end|>' -}}
        {%- endgeneration -%}
    {%- elif message.role in ['system', 'user'] -%}
        {{- '<|' + message.role + '|>' + message.content + '<|end|>' -}}
    {%- else -%}
        {{- raise_exception('unknown role ' + message.role) -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""
"""`<|end|>` ends every turn and is the end-of-sequence token too, so that generation stops after an answer."""


def train_sentencepiece(texts: Iterable[str], *, vocabulary: int, threads: int) -> bytes:
    """Train a byte-pair model with byte fallback that leaves every character as it is; returns the model file.

    Blanks and line breaks are ordinary characters: runs of blanks (indentation) and line ends become tokens.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=False,
        split_digits=True,
        max_sentence_length=1 << 20,
        pad_id=0,
        pad_piece=PAD,
        bos_id=1,
        bos_piece=BEGIN,
        eos_id=2,
        eos_piece=END,
        unk_id=3,
        unk_piece=UNKNOWN,
        control_symbols=ROLES,
        num_threads=threads,
        minloglevel=2,
    )
    return model.getvalue()


def to_hugging_face(model: bytes) -> PreTrainedTokenizerFast:
    """The same tokenizer for Hugging Face, with a chat template that marks the assistant's turns."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(index) for index in range(processor.get_piece_size())]
    ranks = {piece: index for index, piece in enumerate(pieces)}
    mergeable = {piece for piece, rank in ranks.items() if not (processor.is_control(rank) or processor.is_byte(rank))}
    # SentencePiece merges any two neighbours whose union is a piece, the earliest-learnt piece first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        if piece in mergeable
        for cut in range(1, len(piece))
        if piece[:cut] in mergeable and piece[cut:] in mergeable
    ]
    assert all(ranks["".join(a)] <= ranks["".join(b)] for a, b in pairwise(merges))
    backend = Tokenizer(models.BPE(ranks, merges, unk_token=UNKNOWN, fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(t, normalized=False) for t in (PAD, BEGIN, END, UNKNOWN, *ROLES)])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, ranks[BEGIN])]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        extra_special_tokens=ROLES,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(model: bytes, directory: Path) -> PreTrainedTokenizerFast:
    """Write the Hugging Face files and, for other programs, the SentencePiece model itself into `directory`."""
    tokenizer = to_hugging_face(model)
    tokenizer.save_pretrained(directory)
    (directory / "sentencepiece.model").write_bytes(model)
    return tokenizer
