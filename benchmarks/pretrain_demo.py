"""Pretrain the embedded teacher: a 2 M-parameter Llama on the source text of CPython's standard library.

    PYTHONPATH=.:kernels:cli python benchmarks/pretrain_demo.py --work build/pretrain

Two stages, both in one call when their output is missing. *Prepare* (CPU) reads the train and held-out documents of
`linearize.demo.text`, trains the byte-level BPE on the train part alone, adds the library's own tests (files of the
same train part) as further training text and writes `tokenizer/` and `tokens.npz` into --work; with `--steps 0` it
stops there, so that tokens made on one machine can be trained on another. *Train* packs
the train documents anew every epoch (order shuffled, BOS before every second document at random, EOS after each),
fits the model, saves it as bf16 safetensors in --work/teacher, reloads it through the Auto classes and measures how
much of its context it uses. Everything printed also goes to --work/pretrain_demo.log.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import time
import tokenize
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
CONTEXT = 1024
WINDOW = 64
ARCHITECTURE = {
    "hidden_size": 192,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 384,
}


class Log:
    """Prints a line and appends it to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.write_text("")

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def train_tokenizer(texts: list[str], vocab_size: int, context: int = CONTEXT) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte is a token, so any text survives encode and decode unchanged."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write tokenizer.json and a tokenizer_config.json without the fields that only describe this machine's load."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    kept = {k: v for k, v in config.items() if k not in ("backend", "is_local", "local_files_only")}
    path.write_text(json.dumps(kept, indent=2) + "\n")


def test_documents() -> list[str]:
    """The text of the library's test files whose names fall in the train part; the demo itself leaves tests out."""
    from linearize.demo.text import split_of, stdlib_folder

    root, texts = stdlib_folder(), []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(f for f in subfolders if f not in ("site-packages", "dist-packages", "__pycache__"))
        here = Path(folder).relative_to(root)
        if not {"test", "tests", "idle_test"} & set(here.parts):
            continue
        for file in sorted(files):
            if file.endswith(".py") and split_of((here / file).as_posix()) == "train":
                try:
                    with tokenize.open(Path(folder, file)) as source:
                        texts.append(source.read())
                except (SyntaxError, UnicodeDecodeError):  # some tests are about source that cannot be read
                    continue
    return [text for text in texts if text.strip()]


def prepare(work: Path, vocab_size: int, log: Log) -> None:
    """Write `tokenizer/` and `tokens.npz` (ids uint16 [n], document lengths int64 [d], and text bytes, per split)."""
    from linearize.demo.text import stdlib_documents

    documents = {split: [text for _, text in stdlib_documents(split)] for split in ("train", "heldout")}
    tokenizer = train_tokenizer(documents["train"], vocab_size)
    documents["train"] += test_documents()
    arrays: dict[str, Any] = {"python": np.array(platform.python_version())}
    for split, texts in documents.items():
        encoded = [np.array(e.ids, dtype=np.uint16) for e in tokenizer.backend_tokenizer.encode_batch(texts)]
        arrays[f"{split}_ids"] = np.concatenate(encoded)
        arrays[f"{split}_lengths"] = np.array([len(ids) for ids in encoded])
        arrays[f"{split}_bytes"] = np.array(sum(len(text.encode()) for text in texts))
        log(
            f"prepare {split}: {len(texts)} documents, {arrays[f'{split}_bytes']:,} bytes, "
            f"{arrays[f'{split}_ids'].size:,} tokens"
        )
    save_tokenizer(tokenizer, work / "tokenizer")
    np.savez_compressed(work / "tokens.npz", **arrays)


def split_documents(tokens: Any, split: str) -> list[np.ndarray]:
    """The token ids of each document of a split, uint16 [length]."""
    return np.split(tokens[f"{split}_ids"], np.cumsum(tokens[f"{split}_lengths"])[:-1])


def training_batches(
    docs: list[np.ndarray], batch: int, context: int, seed: int, mark: Callable[..., list[np.ndarray]]
) -> Iterator[np.ndarray]:
    """Endless batches int64 [batch, context + 1]; each epoch shuffles the documents and cuts new windows.

    `mark(document, rng)` gives the pieces that stand for a document in the stream: itself and what marks its ends.
    """
    rng = np.random.default_rng(seed)
    left = np.empty((0, context + 1), dtype=np.uint16)
    while True:
        pieces = [piece for index in rng.permutation(len(docs)) for piece in mark(docs[index], rng)]
        stream = np.concatenate(pieces)
        stream = stream[rng.integers(context) :]
        count = len(stream) // (context + 1)
        windows = stream[: count * (context + 1)].reshape(count, context + 1)
        left = np.concatenate([left, windows[rng.permutation(count)]])
        while len(left) >= batch:
            yield left[:batch].astype(np.int64)
            left = left[batch:]


def bos_at_random(config: LlamaConfig) -> Callable[..., list[np.ndarray]]:
    """EOS after each document, BOS before half: users pack text both ways, and both must look familiar."""
    bos, eos = (np.array([token], dtype=np.uint16) for token in (config.bos_token_id, config.eos_token_id))
    return lambda doc, rng: [bos, doc, eos] if rng.random() < 0.5 else [doc, eos]


def learning_rate(progress: float, peak: float, warmup: float, floor: float) -> float:
    """Linear warm-up over the share `warmup`, then a cosine to `floor` of the peak; progress in [0, 1]."""
    if progress < warmup:
        return peak * (progress + 1e-4) / (warmup + 1e-4)
    share = (progress - warmup) / (1 - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0))))


def train(
    model: LlamaForCausalLM, docs: list[np.ndarray], held: torch.Tensor, args: argparse.Namespace, log: Log
) -> None:
    """Fit `model` in place: AdamW on fp32 masters, bf16 autocast on a GPU; `held` int64 [N, CONTEXT] is only watched.

    Raises:
        SystemExit: the loss is no longer finite.
    """
    device = next(model.parameters()).device
    hooks = add_dropout(model, args.dropout)
    decay = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decay, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), eps=1e-8, fused=device.type == "cuda")
    data = training_batches(docs, args.batch, CONTEXT, args.seed, bos_at_random(model.config))
    epoch_tokens = sum(len(d) + 1.5 for d in docs)
    start, running = time.time(), None
    model.train()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step / args.steps, args.lr, args.warmup, args.min_lr)
        window = torch.from_numpy(next(data)).to(device, non_blocking=True)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        running = loss.detach() if running is None else 0.95 * running + 0.05 * loss.detach()
        done = step + 1
        if done % args.log_every == 0 or done == args.steps:
            tokens = done * args.batch * CONTEXT
            value = float(running)
            if not math.isfinite(value):
                raise SystemExit(f"training diverged at step {done}: loss {value}. Lower --lr")
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                model.eval()
                watched = token_losses(model, held, "full", 32).mean().item()
                model.train()
            epoch, seconds = tokens / epoch_tokens, time.time() - start
            log(
                f"train step {done}/{args.steps} loss {value:.4f} held-out {watched:.4f} grad {float(norm):.2f} "
                f"lr {group['lr']:.2e} tokens {tokens / 1e6:.1f} M epoch {epoch:.2f} seconds {seconds:.0f}"
            )

    for hook in hooks:
        hook.remove()


def add_dropout(model: LlamaForCausalLM, rate: float) -> list[Any]:
    """Drop shares of what embeddings, attention and MLP add to the residual stream; Llama itself has no such place."""

    def drop(module: torch.nn.Module, _: Any, out: torch.Tensor) -> torch.Tensor:
        return F.dropout(out, rate, module.training)

    places = [model.model.embed_tokens]
    places += [place for layer in model.model.layers for place in (layer.self_attn.o_proj, layer.mlp)]
    return [place.register_forward_hook(drop) for place in places] if rate else []


def window_mask(length: int, kind: str, device: torch.device) -> torch.Tensor | None:
    """Additive mask fp32 [1, 1, length, length] of a causal cut: "full" (None), "block" or "sliding"."""
    if kind == "full":
        return None
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length, device=device)[None, :]
    near = i // WINDOW - j // WINDOW <= 1 if kind == "block" else i - j < WINDOW
    return torch.zeros(length, length, device=device).masked_fill(~(near & (j <= i)), -math.inf)[None, None]


@torch.no_grad()
def token_losses(model: Any, windows: torch.Tensor, kind: str, batch: int) -> torch.Tensor:
    """Cross-entropy in nats of every predicted token, fp32 [N, length - 1], for windows int64 [N, length]."""
    mask, out = window_mask(windows.shape[1], kind, windows.device), []
    for rows in windows.split(batch):
        logits = model(input_ids=rows, attention_mask=mask, use_cache=False).logits.float()
        out.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="none").cpu())
    return torch.cat(out).view(len(windows), -1)


def heldout_windows(docs: list[np.ndarray], length: int, eos: int, device: str) -> torch.Tensor:
    """Documents, each followed by EOS, joined and cut into int64 [N, length]; the tail is dropped."""
    stream = np.concatenate([piece for doc in docs for piece in (doc, [eos])]).astype(np.int64)
    count = len(stream) // length
    return torch.from_numpy(stream[: count * length].reshape(count, length)).to(device)


def evaluate(folder: Path, docs: list[np.ndarray], text_bytes: int, args: argparse.Namespace, log: Log) -> None:
    """Reload the saved teacher and log its held-out perplexities (fp32 arithmetic on the bf16 weights)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
    tokens = sum(len(doc) + 1 for doc in docs)
    for length in (512, 1024):
        windows = heldout_windows(docs, length, model.config.eos_token_id, args.device)
        if args.eval_windows:
            windows = windows[: args.eval_windows * 512 // length]
        batch = max(1, 32 * 512 // length)
        losses = {kind: token_losses(model, windows, kind, batch) for kind in ("full", "block", "sliding")}
        full = losses["full"].mean().exp().item()
        log(f"held-out concat@{length}: {len(windows)} windows, full context PPL {full:.4f}")
        for kind in ("block", "sliding"):
            value = losses[kind].mean().exp().item()
            log(f"held-out concat@{length}: {WINDOW}-token {kind} window PPL {value:.4f} ({value / full - 1:+.1%})")
        # Masking also hides what the first tokens absorb; reading the short context afresh tells that effect apart.
        short = windows.unfold(1, 2 * WINDOW, WINDOW).reshape(-1, 2 * WINDOW)
        fresh = token_losses(model, short, "full", batch * length // (2 * WINDOW))[:, WINDOW - 1 :].mean().exp().item()
        late = losses["full"][:, WINDOW - 1 :].mean().exp().item()
        log(
            f"held-out concat@{length}: targets after the first {WINDOW}: full {late:.4f}, "
            f"re-read with {WINDOW}..{2 * WINDOW - 1} tokens of context {fresh:.4f} ({fresh / late - 1:+.1%})"
        )
        edges = [e for e in (1, 64, 128, 256, 512, 1024) if e <= length]
        by_target = losses["full"]
        spans = [f"{a}-{b - 1} {by_target[:, a - 1 : b - 1].mean().exp().item():.3f}" for a, b in pairwise(edges)]
        log(f"held-out concat@{length}: full-context PPL by position of the target: {', '.join(spans)}")
    bits = tokens / text_bytes / math.log(2)
    log(f"held-out: {text_bytes / tokens:.3f} bytes a token; concat@1024 {math.log(full) * bits:.4f} bits a byte")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for prompt in ("def ", "def __init__(self", "import os\nimport sys\n\nclass"):
        inputs = tokenizer(prompt, return_tensors="pt").to(args.device)
        torch.manual_seed(0)
        ids = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=40)[0]
        log(f"sample from {prompt!r} (temperature 0.7, top-k 40):\n{tokenizer.decode(ids)}\n--- end of sample")


def main() -> None:
    """Parse the options and run the missing stages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for tokens, tokenizer, log and the teacher")
    parser.add_argument("--prepared", type=Path, help="folder with tokenizer/ and tokens.npz, when not --work")
    parser.add_argument("--steps", type=int, default=3300, help="0: prepare only")
    parser.add_argument("--batch", type=int, default=64, help="windows of 1024 tokens a step")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    parser.add_argument("--min-lr", type=float, default=0.05, help="share of --lr at the end of the cosine")
    parser.add_argument("--weight-decay", type=float, default=0.4)
    parser.add_argument("--dropout", type=float, default=0.1, help="on embeddings and on what each block adds")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--eval-windows", type=int, help="score at most this many held-out windows of 512")
    parser.add_argument("--log-every", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    log = Log(args.work / "pretrain_demo.log")
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.machine()
    log(f"date {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC; {name}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    prepared = args.prepared or args.work
    if not (prepared / "tokens.npz").exists():
        prepare(prepared, args.vocab, log)
    if args.steps == 0:
        return
    tokens = np.load(prepared / "tokens.npz", allow_pickle=False)
    tokenizer = AutoTokenizer.from_pretrained(prepared / "tokenizer")
    docs = {split: split_documents(tokens, split) for split in ("train", "heldout")}
    for split in docs:
        log(f"{split}: standard library of CPython {tokens['python']}, {len(docs[split])} files, "
            f"{int(tokens[f'{split}_bytes']):,} bytes, {tokens[f'{split}_ids'].size:,} tokens")  # fmt: skip

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    config = LlamaConfig(
        vocab_size=len(tokenizer), max_position_embeddings=CONTEXT, tie_word_embeddings=True, **ARCHITECTURE,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attention_bias=False, mlp_bias=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to(args.device)
    log(f"model: {ARCHITECTURE}, vocab {len(tokenizer)}, context {CONTEXT}, {model.num_parameters():,} parameters")
    log(f"options: { {k: v for k, v in vars(args).items() if k not in ('work', 'prepared')} }")
    held = heldout_windows(docs["heldout"], CONTEXT, tokenizer.eos_token_id, args.device)
    train(model, docs["train"], held[:: max(1, len(held) // (args.eval_windows or 64))], args, log)

    folder = args.work / "teacher"
    model.eval().to(torch.bfloat16).save_pretrained(folder, safe_serialization=True)
    save_tokenizer(tokenizer, folder)
    size = (folder / "model.safetensors").stat().st_size
    log(f"saved: model.safetensors {size:,} bytes, bf16")
    torch.set_float32_matmul_precision("highest")
    evaluate(folder, docs["heldout"], int(tokens["heldout_bytes"]), args, log)


if __name__ == "__main__":
    main()
