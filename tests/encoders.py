"""Tiny masked language models on disk, with tokenizers made here, and a text of short and long documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = [
    *("the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then"),
    *("it", "was", "very", "old", "green", "small", "house", "saw", "no", "one", "there"),
]
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 66,
    "type_vocab_size": 2,
    "initializer_range": 0.3,
}


def documents(count: int = 120) -> list[str]:
    """Sentences with some order in them, 3 to 90 words long."""
    return [
        " ".join(WORDS[(n * 7 + i * (1 + n % 3)) % len(WORDS)] for i in range(3 + (n * 13) % 88)) for n in range(count)
    ]


def text_file(path: Path, count: int = 120) -> Path:
    """The documents as a .jsonl file."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents(count)))
    return path


def save_tokenizer(folder: Path, family: str) -> int:
    """BERT's WordPiece, or a RoBERTa-like tokenizer (specials first, pad 1), of WORDS; the size of the vocabulary."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertTokenizer, PreTrainedTokenizerFast

    if family == "bert":
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        vocab = {word: n for n, word in enumerate([*special, *WORDS])}
        BertTokenizer(vocab=vocab, model_max_length=64).save_pretrained(folder)
        return len(vocab)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    vocab = {word: n for n, word in enumerate([*special, *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", cls_token="<s>", sep_token="</s>",
        pad_token="<pad>", unk_token="<unk>", mask_token="<mask>", model_max_length=64,
    ).save_pretrained(folder)  # fmt: skip
    return len(vocab)


def build(folder: Path, family: str, **changes: Any) -> Path:
    """A random model of `family` with its tokenizer in `folder`, float32, no parameter at its default."""
    import torch
    from transformers import BertConfig, BertForMaskedLM, RobertaConfig, RobertaForMaskedLM

    folder.mkdir(parents=True, exist_ok=True)
    size = save_tokenizer(folder, family)
    pad = {"bert": 0, "roberta": 1}[family]
    sizes = {**SIZES, "vocab_size": size, "pad_token_id": pad, **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = (
            BertForMaskedLM(BertConfig(**sizes)) if family == "bert" else RobertaForMaskedLM(RobertaConfig(**sizes))
        )
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and "decoder.bias" not in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder
