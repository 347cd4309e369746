"""`linearize bench`: speed and memory against context and batch, student and teacher in turns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from linearize.errors import UsageError
from linearize_cli.commands import Device, Dtype, Json, Revision, app
from linearize_cli.output import human_bytes, only_json, print_json, print_table, say, seconds, watching

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKmMgGtT]?)(?:i?[bB])?")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@app.command(short_help="Measure speed and memory, beside the teacher.")
def bench(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A converted model.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="TEACHER", help="Measure this model in turns with OUT.")
    ] = None,
    contexts: Annotated[
        str | None, typer.Option("--contexts", metavar="A,B", help="Tokens of the prompt, as in 512,2k,8k (2k: 2048).")
    ] = None,
    batches: Annotated[str, typer.Option("--batches", metavar="A,B", help="Sequences at once.")] = "1,4,16",
    new_tokens: Annotated[int, typer.Option("--new-tokens", metavar="N", min=8, help="To write after a prompt.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Measured runs a point.")] = 3,
    max_seconds: Annotated[
        float, typer.Option("--max-seconds", metavar="S", min=0.1, help="For one model at one point.")
    ] = 120.0,
    max_memory: Annotated[
        str | None, typer.Option("--max-memory", metavar="8GiB", help="Above the weights (80 % of what is free).")
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory/--no-memory", help="On a CPU: measure memory, in a fresh process a point.")
    ] = True,
    plots: Annotated[Path | None, typer.Option("--plots", metavar="FOLDER", help="Write plots there, as SVG.")] = None,
    file: Annotated[
        Path | None, typer.Option("--out", metavar="FILE.jsonl", help="Add each row to this file when it is there.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", min=0, max=2**32 - 1, help="Of the tokens.")] = 0,
    revision: Revision = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure how fast OUT reads and writes, and what it keeps in memory, beside its teacher.

    Both read the same tokens and write as many, greedily, through transformers' generate, and take turns. Points that
    would take too long or too much memory are skipped, and say so. Contexts beyond what the teacher was trained on are
    measured for OUT alone.

    \b
    Examples:
      linearize bench out --against demo --contexts 256,768 --batches 1,4
      linearize bench out --against ./my-llama --contexts 2k,8k,32k --new-tokens 128 --plots plots --out bench.jsonl
    """
    from linearize.artifacts.download import pin

    out = pin(out, revision)
    wanted = None if contexts is None else _sizes("--contexts", contexts)
    many = _sizes("--batches", batches)
    most = None if max_memory is None else _size("--max-memory", max_memory)
    with only_json(as_json), watching():
        from linearize.evaluate.speed import bench as run

        result = run(
            out,
            against=against,
            contexts=wanted,
            batches=many,
            new_tokens=new_tokens,
            device=device,
            dtype=dtype,
            repeats=repeats,
            max_seconds=max_seconds,
            max_bytes=most,
            memory=memory,
            seed=seed,
            file=file,
            plots=plots,
        )
    if as_json:
        return print_json(result)
    print_bench(result)


def print_bench(result: Mapping[str, Any]) -> None:
    """What `linearize.bench` returns: one row a point and model, medians with their spread."""
    rows = result["rows"]
    first = rows[0]
    machine = first["machine"]
    where = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    versions = ", ".join(f"{name} {number}" for name, number in first["versions"].items())
    names = dict.fromkeys(f"{row['role']} {row['model']}" for row in rows)
    say(f"{', '.join(names)}; {first['dtype']} on {where}; {first['date']}; {versions}")
    print_table([_cells(row) for row in rows], title="Medians (± half of what lies between the extremes)")
    for row in rows:
        if row["reason"]:
            point = f"{row['context']:,} tokens x {row['batch']}"
            say(f"{row['status']}: {row['role']} {row['model']}, {point}: {row['reason']}")
    beyond = sorted({row["context"] for row in rows if row["beyond_trained"] and row["status"] == "ok"})
    if beyond:
        shown = ", ".join(f"{context:,}" for context in beyond)
        say(f"note: the student was not trained on contexts of {shown} tokens; only its speed and memory are meant")
    for note in result["notes"]:
        say(f"note: {note}")
    for path in [*result["plots"], *([result["file"]] if result["file"] else [])]:
        say(f"wrote {path}")


def _cells(row: Mapping[str, Any]) -> dict[str, Any]:
    cells: dict[str, Any] = {"context": f"{row['context']:,}", "batch": row["batch"], "model": row["role"]}
    if row["status"] != "ok":
        return cells | {"decode tok/s": row["status"]}
    return cells | {
        "decode tok/s": _spread(row, "decode_tokens_per_second"),
        "prefill tok/s": _spread(row, "prefill_tokens_per_second"),
        "first token": seconds(row["ttft_seconds"]),
        "memory": "-" if row["peak_bytes"] is None else human_bytes(row["peak_bytes"]),
        "state": human_bytes(row["state_bytes"]) if row["state_bytes"] else "-",
        "KV cache": human_bytes(row["kv_bytes"]) if row["kv_bytes"] else "-",
    }


def _spread(row: Mapping[str, Any], key: str) -> str:
    middle, half = row[key], (row[f"{key}_high"] - row[f"{key}_low"]) / 2
    return f"{middle:,.0f} ± {half:,.0f}" if middle >= 10 else f"{middle:.2f} ± {half:.2f}"


def _sizes(option: str, text: str) -> list[int]:
    return [_size(option, part) for part in text.split(",")]


def _size(option: str, text: str) -> int:
    """`2k` -> 2048, `8GiB` -> 2 ** 33: units of 1024, as contexts and memory are counted."""
    match = _SIZE.fullmatch(text.strip())
    size = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    if size < 1 or size != int(size):
        raise UsageError(f"{option}: {text!r} is not a whole number above 0", "Write 512, 2k or 8GiB.")
    return int(size)
