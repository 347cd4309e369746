"""Convert a teacher by every recipe in a short run and hold the exported models to the invariants of meaning.

    python -m benchmarks.exported TEACHER --data DATA [--tokens 16k] [--context 256]

Each cell is the largest relative error of the check, in float32 on the CPU, or `ok` where the check is exact.
Exits with 1 if an error exceeds 1e-5 or a check fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

TOLERANCE = 1e-5
NEVER = -80.0
"""log of the rate of a decay that takes nothing away."""
LENGTH = 200
CUTS = (0, 1, 63, 64, 66, 129, 193, 194, LENGTH)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """|got - want| / |want|."""
    return ((got - want).norm() / want.norm()).item()


def splits(model: Any, ids: torch.Tensor) -> float:
    """1. Prefill == steps == any split, in logits and in state."""
    from linearize.modeling.cache_linearized import LinearizedCache, LinearStateLayer

    caches = [LinearizedCache(model.config) for _ in range(3)]
    want = model(ids, past_key_values=caches[0]).logits
    plans = (CUTS, range(LENGTH + 1))
    errors = []
    for cache, plan in zip(caches[1:], plans, strict=True):
        got = [model(ids[:, a:b], past_key_values=cache).logits for a, b in pairwise(plan)]
        errors.append(relative(torch.cat(got, 1), want))
        for mine, other in zip(cache.layers, caches[0].layers, strict=True):
            if isinstance(mine, LinearStateLayer):
                errors.append(relative(mine.tensors["state"], other.tensors["state"]))
    return max(errors)


def causality(model: Any, ids: torch.Tensor) -> float:
    """2. Neither later tokens nor the total length change a token's output."""
    want = model(ids).logits
    changed = ids.clone()
    changed[:, 150:] = ids[:, 150:].flip(1)
    errors = [relative(model(changed).logits[:, :150], want[:, :150])]
    return max(errors + [relative(model(ids[:, :n]).logits, want[:, :n]) for n in (1, 2, 63, 64, 65, 127, 129)])


def pairs(model: Any, ids: torch.Tensor) -> float | str:
    """3. Where one denominator is shared, a row's weights over all causal pairs sum to one, none missing.

    Queries are set to zero for this, shares to what the window's own mass says, and nothing is forgotten: no weight can
    then underflow and no gate round to one, so that a zero is a pair left out.
    """
    from linearize.modeling.modeling_linearized import attention_layers

    modules: list[Any] = [module for _, module in attention_layers(model)]
    if modules[0].mixer.spec.normaliser not in ("shared", "own"):
        return "-"
    causal = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()
    worst, missing = 0.0, False
    for module in modules:
        neutral = {module.q_proj.weight: 0.0}
        for name, parameter in module.mixer.named_parameters():
            if name.startswith(("mix_gate.", "far_mass.", "q_own.")):
                neutral[parameter] = 0.0
            elif name == "decay.a_log":
                neutral[parameter] = NEVER
        kept = {parameter: parameter.clone() for parameter in neutral}
        for parameter, value in neutral.items():
            parameter.fill_(value)
        module.mixer.record_weights = True
        model(ids, use_cache=False)
        weights, module.mixer.record_weights, module.mixer.last_weights = module.mixer.last_weights, False, None
        for parameter, was in kept.items():
            parameter.copy_(was)
        missing |= bool((weights[..., causal] <= 0).any() or (weights[..., ~causal] != 0).any())
        worst = max(worst, (weights.sum(-1) - 1).abs().max().item())
    return "missing" if missing else worst


def padding(model: Any, ids: torch.Tensor) -> float:
    """4. A left-padded batch == each sequence alone."""
    mask = torch.ones_like(ids)
    mask[1, :37] = 0
    got = model(ids, attention_mask=mask).logits
    return max(relative(got[:1], model(ids[:1]).logits), relative(got[1:, 37:], model(ids[1:, 37:]).logits))


def packing(model: Any, ids: torch.Tensor) -> float | str:
    """5. Packed documents == each alone."""
    positions = torch.cat((torch.arange(67), torch.arange(LENGTH - 67)))[None]
    got = model(ids[:1], position_ids=positions, use_cache=False).logits
    return max(relative(got[:, :67], model(ids[:1, :67]).logits), relative(got[:, 67:], model(ids[:1, 67:]).logits))


def grouping(model: Any, ids: torch.Tensor) -> str:
    """6. Query head h reads kv head h // (H / HK)."""
    from linearize.modeling.modeling_linearized import attention_layers

    module: Any = attention_layers(model)[0][1]
    mixer = module.mixer
    group = mixer.num_heads // mixer.num_kv_heads

    def heads() -> torch.Tensor:
        mixer.record = True
        model(ids, use_cache=False)
        out, mixer.record, mixer.last_output = mixer.last_output, False, None
        return out

    want, weight = heads(), module.v_proj.weight
    for head in range(mixer.num_kv_heads):
        rows = slice(head * mixer.head_dim, (head + 1) * mixer.head_dim)
        kept = weight[rows].clone()
        weight[rows] += 0.5
        moved = (heads() - want).abs().amax(dim=(0, 1, 3)) > 0
        weight[rows] = kept
        if moved.nonzero().flatten().tolist() != list(range(head * group, (head + 1) * group)):
            return f"kv head {head} reaches query heads {moved.nonzero().flatten().tolist()}"
    return "ok"


def constant_state(model: Any, ids: torch.Tensor) -> str:
    """7. The state is float32 and as large after 800 tokens as after 200."""
    from linearize.modeling.cache_linearized import LinearizedCache, LinearStateLayer

    cache, sizes = LinearizedCache(model.config), set()
    for _ in range(4):
        model(ids, past_key_values=cache)
        sizes.add(cache.state_bytes)
    states = [layer.tensors["state"] for layer in cache.layers if isinstance(layer, LinearStateLayer)]
    return "ok" if len(sizes) == 1 and all(s.dtype == torch.float32 for s in states) else f"sizes {sizes}"


CHECKS: dict[str, Callable[[Any, torch.Tensor], float | str]] = {
    "1 splits": splits,
    "2 causal": causality,
    "3 pairs": pairs,
    "4 padding": padding,
    "5 packing": packing,
    "6 heads": grouping,
    "7 state": constant_state,
}


def row(recipe: str, arguments: argparse.Namespace, folder: Path) -> dict[str, float | str]:
    """Convert by `recipe`, load the export, run every check."""
    import linearize

    out = folder / recipe
    overrides = [f"align.tokens={arguments.tokens}", f"finetune.tokens={arguments.tokens}"]
    overrides += [f"context={arguments.context}", "device=cpu", "align.batch_tokens=2048", "finetune.batch_tokens=2048"]
    report = linearize.convert(arguments.teacher, out, recipe=recipe, data=arguments.data, overrides=overrides)
    model, _ = linearize.load(out, device="cpu", dtype="float32")
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (2, LENGTH), generator=draw)
    with torch.no_grad():
        found = {name: check(model, ids) for name, check in CHECKS.items()}
    verified = report["verification"]
    return found | {"15 reload": "ok" if verified else "not verified"}


def main() -> None:
    """Parse, convert by every recipe, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", default="16k", help="of each stage")
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--recipes", help="names, with commas; all of them if not given")
    arguments = parser.parse_args()
    from linearize.recipe import list_recipes

    names = arguments.recipes.split(",") if arguments.recipes else list_recipes()
    failed = False
    print(f"{'recipe':>16}", *(f"{name:>9}" for name in (*CHECKS, "15 reload")))
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            cells = row(name, arguments, Path(folder))
            failed |= any(x not in ("ok", "-") if isinstance(x, str) else x > TOLERANCE for x in cells.values())
            shown = (f"{x:9.1e}" if isinstance(x, float) else f"{x:>9}" for x in cells.values())
            print(f"{name:>16}", *shown, flush=True)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    sys.exit(failed)


if __name__ == "__main__":
    main()
