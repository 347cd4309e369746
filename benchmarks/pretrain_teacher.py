"""Pretrain a small teacher of another family, size and tokenizer, so that no recipe is tuned on one teacher alone.

    python -m benchmarks.pretrain_teacher OUT --family qwen3 --size small --vocab 4096 --data TRAIN.jsonl.xz \\
        --tokens 120M --context 1024 --minutes 6 --heldout HELDOUT.jsonl:source=tech

Trains a byte-level BPE on the text of --data alone (or takes --tokenizer FOLDER), packs the documents anew every epoch
(order shuffled, BOS before each, as `linearize.data.document_marks` reads them), fits the model with a cosine that ends
before --minutes are over, saves bf16 safetensors with the tokenizer in OUT, and reports the held-out perplexity with
the full context and cut to the window: the gap that a conversion has to win back. `--tokens 0` stops after the
tokenizer, so that one made on one machine can be used on another. Everything printed also goes to
OUT/pretrain_teacher.log.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.pretrain_demo import Log, learning_rate, save_tokenizer, train_tokenizer, training_batches
from linearize.artifacts.load import load_model, no_bars, select_device
from linearize.data import load_texts
from linearize.errors import LinearizeError, RefusedError, UsageError, VerificationError
from linearize.evaluate.perplexity import by_position, score
from linearize.evaluate.protocols import Task, make_task, parse_protocol
from linearize.evaluate.recovery import MINIMUM_GAP
from linearize.evaluate.truncation import truncated
from linearize.strict import count, number

WINDOW, SINKS = 64, 4
SKIP, MEASURE = 5, 20
"""The step time is first known after step MEASURE; the first SKIP steps compile, allocate and are not counted."""
MARGIN = 0.97
"""Share of the time left that a shortened schedule is planned into."""
WATCHED = 16
"""Held-out windows that are read while training."""

FAMILIES: dict[str, dict[str, Any]] = {
    # Rotation bases are the families' own. Every layer sees the whole context: a window of its own would hide the gap.
    "llama": {"rope_theta": 1e4, "attention_bias": False, "mlp_bias": False},
    "mistral": {"rope_theta": 1e4, "sliding_window": None},
    "qwen2": {"rope_theta": 1e6, "use_sliding_window": False},  # q, k and v have biases
    "qwen3": {"rope_theta": 1e6, "use_sliding_window": False, "attention_bias": False},  # q and k are normalised
}


@dataclass(frozen=True, kw_only=True)
class Size:
    """An architecture without its vocabulary; names as in a config."""

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


SIZES = {
    "tiny": Size(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                 intermediate_size=128),
    "small": Size(num_hidden_layers=6, hidden_size=384, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
                  intermediate_size=1024),
    "deep": Size(num_hidden_layers=10, hidden_size=320, num_attention_heads=10, num_key_value_heads=5, head_dim=32,
                 intermediate_size=896),
    "wide": Size(num_hidden_layers=5, hidden_size=448, num_attention_heads=4, num_key_value_heads=1, head_dim=128,
                 intermediate_size=1152),
}  # fmt: skip
"""With 4096 tokens: 0.3, 11, 13 and 12 M parameters; head_dim 16, 64, 32 and 128; 2, 3, 2 and 4 heads share keys."""


def build_model(family: str, size: str, *, tokenizer: Any, context: int) -> Any:
    """A freshly drawn fp32 model with tied embeddings, its ids of BOS, EOS and padding those of `tokenizer`."""
    own = dict(FAMILIES[family])
    rope = {"rope_type": "default", "rope_theta": own.pop("rope_theta")}
    config = AutoConfig.for_model(
        family, vocab_size=len(tokenizer), max_position_embeddings=context, rope_parameters=rope,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, **asdict(SIZES[size]), **own,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        UsageError: none there, one without BOS, or one of more than 65,536 tokens.
    """
    if not (folder / "tokenizer.json").is_file():
        raise UsageError(f"{folder} has no tokenizer.json", hint="Make one with --tokens 0")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if tokenizer.bos_token_id is None:
        raise UsageError(f"the tokenizer in {folder} has no BOS, which stands before each document")
    if len(tokenizer) > 1 << 16:
        raise UsageError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, and ids are stored in 16 bits")
    return tokenizer


def encode(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    """Token ids of every text without special tokens, uint16 [length]; on all cores."""
    core, step = tokenizer.backend_tokenizer, 1000  # a part at a time: the library's own records are large
    parts = (core.encode_batch_fast(texts[i : i + step], add_special_tokens=False) for i in range(0, len(texts), step))
    return [np.array(one.ids, dtype=np.uint16) for part in parts for one in part]


def bos_before(bos: int) -> Callable[..., list[np.ndarray]]:
    """BOS before each document, for `training_batches`."""
    piece = np.array([bos], dtype=np.uint16)
    return lambda doc, _: [piece, doc]


def make_optimizers(model: Any, kind: str, *, lr: float, weight_decay: float) -> list[torch.optim.Optimizer]:
    """AdamW for all, or Muon for the matrices of the layers and AdamW for the rest. One rate fits both.

    Muon's steps are brought to the size of AdamW's (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).

    Raises:
        UsageError: Muon, and this torch has none.
    """
    layers = {id(p) for p in model.model.layers.parameters() if p.ndim == 2} if kind == "muon" else set()
    hidden = [p for p in model.parameters() if id(p) in layers]
    matrices = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in layers]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    fused = next(model.parameters()).is_cuda
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)]
    if hidden:
        if not hasattr(torch.optim, "Muon"):
            raise UsageError(f"torch {torch.__version__} has no Muon", hint="Use --optimizer adamw, or torch >= 2.9")
        muon = torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        optimizers.append(muon)
    return optimizers


def fit_steps(planned: int, done: int, *, step_seconds: float, seconds_left: float) -> int:
    """How many steps in all: `planned` if they fit into the time left, else what fits with a margin, or `done`."""
    if (planned - done) * step_seconds <= seconds_left:
        return planned
    return done + max(0, int(MARGIN * seconds_left / step_seconds))


def train(
    model: Any, batches: Iterator[np.ndarray], *, steps: int, deadline: float, optimizers: list[torch.optim.Optimizer],
    args: argparse.Namespace, watched: Task | None, epoch_tokens: int, log: Callable[[str], None],
) -> int:  # fmt: skip
    """Fit `model` in place (bf16 autocast on a GPU, fp32 masters) and return the steps taken.

    `deadline` is a time of `time.monotonic()`. The measured time of a step shortens the schedule when `steps` do not
    fit before it, and the cosine with it, so that the rate always ends at its floor.

    Raises:
        VerificationError: the loss is no longer finite.
    """
    device, rows = next(model.parameters()).device, watched.rows[:WATCHED] if watched else []
    tokens_a_step = args.batch * args.context
    if args.compile:
        # Layer by layer: one compilation serves all, and outside of it transformers still leaves out the mask, without
        # which SDPA takes its flash kernel. In one graph with the model it would build and pass one.
        for layer in model.model.layers:
            layer.compile(dynamic=False)
    running: torch.Tensor | None = None
    done, measured, mark = 0, False, (0.0, 0)
    model.train()
    while done < steps:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(done / steps, args.lr, args.warmup, args.min_lr)
        rate = group["lr"]
        window = torch.from_numpy(next(batches))
        window = window.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else window
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=window[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        running = loss.detach() if running is None else 0.95 * running + 0.05 * loss.detach()
        done += 1
        if done == SKIP:
            running.item()  # waits for the device, and so does every other reading of the clock
            mark = (time.monotonic(), done)
        elif done > SKIP and (done in (MEASURE, steps) or done % args.log_every == 0):
            value, now = float(running), time.monotonic()
            step_seconds = (now - mark[0]) / (done - mark[1])
            fitting = fit_steps(steps, done, step_seconds=step_seconds, seconds_left=deadline - now)
            if fitting < steps or not measured:
                end = "time is over: training ends here" if fitting == done < steps else "the cosine ends with them"
                log(f"plan: {step_seconds * 1e3:.1f} ms a step, {deadline - now:.0f} s left: "
                    f"{fitting} of {steps} steps, {end}")  # fmt: skip
            steps, measured = fitting, True
            if not math.isfinite(value):
                raise VerificationError(f"training diverged at step {done}: loss {value}", hint="Lower --lr")
            held = f" held-out {watch(model, rows, compiled=args.compile):.4f}" if rows else ""
            log(f"step {done}/{steps} loss {value:.4f}{held} grad {float(norm):.2f} lr {rate:.2e} "
                f"tokens {done * tokens_a_step / 1e6:.1f} M epoch {done * tokens_a_step / epoch_tokens:.2f} "
                f"{tokens_a_step / step_seconds / 1e3:,.0f} k tokens/s")  # fmt: skip
            mark = (time.monotonic(), done)
    if running is not None and not math.isfinite(float(running)):
        raise VerificationError(f"training diverged before step {done}", hint="Lower --lr")
    return done


def watch(model: Any, rows: list[Any], *, compiled: bool) -> float:
    """Nats per token of `rows`; a compiled model is run as it is written, not compiled again for another shape."""
    eager: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    autocast = torch.autocast(model.device.type, dtype=torch.bfloat16, enabled=model.device.type == "cuda")
    with eager, autocast:
        return score(model, rows).mean


def report(folder: Path, task: Task, *, device: torch.device, log: Callable[[str], None]) -> None:
    """Reload the saved teacher as an audit would and log its perplexities: whole, cut, and by position."""
    model = load_model(folder, device=device, dtype="float32" if device.type == "cpu" else "auto")
    whole = score(model, task.rows)
    name = f"held-out {task.protocol}, {len(task.rows)} windows, {task.tokens:,} tokens"
    log(f"{name}: full context PPL {whole.perplexity:.4f}")
    if task.bytes:
        log(f"{name}: {task.bytes / task.tokens:.3f} bytes a token, "
            f"{whole.mean * task.tokens / task.bytes / math.log(2):.4f} bits a byte")  # fmt: skip
    for sinks in (0, SINKS):
        with truncated(model, WINDOW, sinks):
            cut = score(model, task.rows)
        gap = cut.mean - whole.mean
        few = "" if gap >= MINIMUM_GAP else f"; below {MINIMUM_GAP} nats R is not defined"
        log(f"{name}: cut to blocks of {WINDOW} with {sinks} sinks PPL {cut.perplexity:.4f} "
            f"({math.expm1(gap):+.1%}), gap to win {gap:.4f} nats{few}")  # fmt: skip
    spans = [f"{row['from']}-{row['to'] - 1} {row['perplexity']:.3f}" for row in by_position(whole)]
    log(f"{name}: PPL by tokens seen: {', '.join(spans)}")


def pretrain(args: argparse.Namespace, *, begin: float) -> None:
    """All stages. `begin` is the time of `time.monotonic()` from which --minutes count."""
    device = select_device(args.device)
    if (args.out / "config.json").exists():
        raise RefusedError(f"{args.out} already holds a model", hint="Give another folder")
    tokenizer = open_tokenizer(args.tokenizer) if args.tokenizer else None
    texts = load_texts(args.data)
    held_texts = load_texts(args.heldout, split="heldout") if args.heldout else None
    args.out.mkdir(parents=True, exist_ok=True)
    log = Log(args.out / "pretrain_teacher.log")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    log(f"date {datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d %H:%M} UTC; {name}; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")  # fmt: skip
    log(f"options: { {k: v for k, v in vars(args).items() if not isinstance(v, Path)} }")
    if tokenizer is None:
        tokenizer = train_tokenizer(texts, args.vocab, args.context)
        log(f"tokenizer: {len(tokenizer)} tokens, {time.monotonic() - begin:.0f} s since the start")
    tokenizer.model_max_length = args.context
    save_tokenizer(tokenizer, args.out)
    if args.tokens == 0:
        return
    docs = encode(texts, tokenizer)
    epoch_tokens = sum(len(doc) + 1 for doc in docs)
    log(f"train: {len(docs):,} documents, {epoch_tokens:,} tokens, {time.monotonic() - begin:.0f} s since the start")
    if epoch_tokens < 2 * (args.context + 1):
        raise RefusedError(f"{args.data}: {epoch_tokens} tokens are less than two windows of {args.context}",
                           hint="Give more text or a smaller --context")  # fmt: skip
    task = None
    if held_texts is not None:
        protocol = parse_protocol(None, context=args.context, default_context=args.context)
        task = make_task(protocol, held_texts, tokenizer)

    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    model = build_model(args.family, args.size, tokenizer=tokenizer, context=args.context).to(device)
    log(f"model: {args.family} {asdict(SIZES[args.size])}, vocab {len(tokenizer)}, context {args.context}, "
        f"{model.num_parameters():,} parameters")  # fmt: skip
    steps = max(1, args.tokens // (args.batch * args.context))
    trained = time.monotonic()
    done = train(
        model,
        training_batches(docs, args.batch, args.context, args.seed, bos_before(tokenizer.bos_token_id)),
        steps=steps,
        deadline=begin + 60 * args.minutes,
        optimizers=make_optimizers(model, args.optimizer, lr=args.lr, weight_decay=args.weight_decay),
        args=args,
        watched=task,
        epoch_tokens=epoch_tokens,
        log=log,
    )
    tokens, trained = done * args.batch * args.context, time.monotonic() - trained
    log(f"trained: {done} of {steps} steps, {tokens / 1e6:.1f} M tokens, {tokens / epoch_tokens:.2f} epochs, "
        f"{trained:.0f} s, {time.monotonic() - begin:.0f} s since the start")  # fmt: skip

    with no_bars():
        model.eval().to(torch.bfloat16).save_pretrained(args.out, max_shard_size=args.shard)
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    log(f"saved: {size:,} bytes of bf16 weights in {args.out.name}")
    torch.set_float32_matmul_precision("highest")
    if task is not None:
        report(args.out, task, device=device, log=log)


def main(argv: list[str] | None = None) -> None:
    """Parse the options and run; an error that a user can mend ends in one line."""
    begin = time.monotonic()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--family", choices=FAMILIES, default="qwen3")
    parser.add_argument("--size", choices=SIZES, default="small")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--vocab", type=int, default=4096, help="tokens of the BPE trained on --data")
    source.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="use this one")
    parser.add_argument("--data", required=True, help="what to train on, as for linearize convert")
    parser.add_argument("--heldout", help="what to report on, e.g. heldout.jsonl:source=tech")
    parser.add_argument("--tokens", default="120M", help="tokens to train on, epochs counted; 0: the tokenizer only")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=8.0, help="after the start, when training must have ended")
    parser.add_argument("--batch", type=int, default=64, help="windows a step")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=float, default=0.03, help="share of the steps")
    parser.add_argument("--min-lr", type=float, default=0.03, help="share of --lr at the end of the cosine")
    parser.add_argument("--weight-decay", type=float, default=0.3, help="of matrices; strong, for text read many times")
    parser.add_argument("--compile", action="store_true", help="torch.compile the layers")
    parser.add_argument("--shard", default="5GB", help="largest file of weights, e.g. 15MB")
    parser.add_argument("--log-every", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    try:
        args.tokens = count(0, 10**12)(args.tokens, "--tokens")
        for option in ("vocab", "context", "batch", "log_every"):
            count(1, 1 << 16)(getattr(args, option), "--" + option.replace("_", "-"))
        for option, high in (("minutes", 1e6), ("lr", 1.0), ("warmup", 1.0), ("min_lr", 1.0), ("weight_decay", 1e3)):
            number(0.0, high)(getattr(args, option), "--" + option.replace("_", "-"))
        pretrain(args, begin=begin)
    except LinearizeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    main()
