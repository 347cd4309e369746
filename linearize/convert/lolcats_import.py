"""Published LoLCATs weights on their base model, as an ordinary export: nothing is trained, everything is verified."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch

from linearize.artifacts.atomic import atomic_directory, require_empty, require_free_space, sha256
from linearize.artifacts.download import display_name, origin
from linearize.artifacts.licence import read_licence
from linearize.artifacts.load import (
    check_checkpoint,
    load_model,
    load_tokenizer,
    no_bars,
    resolve,
    select_device,
    select_dtype,
)
from linearize.artifacts.weights import digest_checkpoint
from linearize.convert import export, plan
from linearize.convert.card import front_matter
from linearize.convert.checkpoint import open_run
from linearize.convert.early import path_of, require_out
from linearize.convert.families import require_family
from linearize.convert.lolcats_card import card, notes_on
from linearize.convert.lolcats_format import PAPER, SCALE, TARGETS, Published, read_published
from linearize.convert.lora import inject
from linearize.convert.optim import deterministic
from linearize.convert.stages import timed
from linearize.convert.surgery import linearize_model
from linearize.convert.teacher import checked_tensors, teacher_config
from linearize.convert.verify import expect, verify_export
from linearize.errors import UsageError
from linearize.modeling.configuration_linearized import head_sizes
from linearize.modeling.family_table import lookup
from linearize.progress import NullProgress, Progress
from linearize.recipe import Align, Calibrate, Finetune, Lora, Recipe

FAMILIES = ("llama", "mistral")
"""What LoLCATs converts."""
PROBE = 256
"""Most tokens of a row on which merge and reload are compared."""


def import_lolcats(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    distilled: str | os.PathLike[str],
    finetuned: str | os.PathLike[str] | None = None,
    window: int | None = None,
    lora_alpha: float | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Put LoLCATs' published weights onto their base model and export it to the folder `out`; see `linearize.api`."""
    watch = progress or NullProgress()
    target = path_of(out)
    begin = time.monotonic()
    seconds: dict[str, float] = {}
    require_out(target, resume=False)
    where = select_device(device)
    files = {"distilled": Path(distilled), "finetuned": None if finetuned is None else Path(finetuned)}
    folder = resolve(base)
    require_family(folder)
    check_checkpoint(folder, finite=False)
    config, stored = teacher_config(folder)
    if config.model_type not in FAMILIES:
        raise UsageError(f"LoLCATs converts {' and '.join(FAMILIES)} models, and {base} is a {config.model_type}")
    with timed(seconds, "read"):
        published = read_published(Path(distilled), files["finetuned"], window=window)
    _require_fit(published, config, Path(distilled))
    recipe = _recipe(published, config, lora_alpha=lora_alpha, device=device, dtype=dtype)
    layout = plan.Layout.of(config, recipe, training=False)
    checked_tensors(folder, config)
    kind = select_dtype(stored if dtype == "auto" else dtype)
    sizes = layout.sizes()
    require_free_space(target, (sizes["teacher"] + sizes["new"]) * kind.itemsize + (16 << 20))
    check_checkpoint(folder, finite=True)
    tokenizer = load_tokenizer(folder)
    ids = _probe(config, recipe)
    with open_run(target) as run, deterministic(), no_bars(), torch.random.fork_rng(devices=[]):
        require_empty(target)
        with timed(seconds, "load"):
            teacher = load_model(folder, device=where, dtype=torch.float32, finite=False).requires_grad_(False)
            lora = recipe.finetune.lora if published.adapters else None
            student, _ = linearize_model(
                teacher, spec=recipe.mixer, layer_mixers=layout.mixers, seed=0, own=lambda name: False
            )
            _fill(student, published, lora)
        del teacher
        with timed(seconds, "merge"):
            errors = export.merge(student, ids.to(where), kind)
        name = display_name(base, folder)
        source, licence = origin(folder, name), read_licence(folder, repo=origin(folder, name)["repo"])
        report = _report(published, recipe, layout, name=name, target=target, dtype=kind, errors=errors)
        facts = {
            key: None if path is None else {"name": path.name, "sha256": sha256(path)} for key, path in files.items()
        }
        with atomic_directory(target) as room:
            with timed(seconds, "export"):
                export.write_model(room, student, teacher_folder=folder)
                (room / "README.md").write_text(front_matter(source, licence) + card(report, facts))
            with timed(seconds, "verify"):
                watch.message("loading the export in fresh processes")
                expected = expect(student, tokenizer, ids)
                student.to("cpu")
                report["verification"] = verify_export(room, expected, device=where, room=run.room)
            export.finish_export(
                room,
                {
                    "recipe": recipe.as_dict(),
                    "recipe_digest": recipe.digest(),
                    "name": target.name,
                    "teacher": source | {"digest": digest_checkpoint(folder), "licence": licence},
                    "imported": {"format": "lolcats", **facts},
                    "figures": {key: report[key] for key in ("merge_error", "verification", "state_bytes")},
                },
            )
    report["device"] = str(where)
    report["seconds"] = seconds | {"total": time.monotonic() - begin}
    return report


def _require_fit(published: Published, config: Any, path: Path) -> None:
    """Refuse maps or adapters of another model, by name, before a weight is loaded."""
    heads, _, width = head_sizes(config)
    for layer, entry in sorted(published.maps.items()):
        if layer >= config.num_hidden_layers:
            raise UsageError(f"{path}: has maps for layer {layer}, and the base has {config.num_hidden_layers} layers")
        for name, tensor in entry.items():
            wanted = [heads] if name == "window_logit" else [heads, width, published.feature_dim]
            if list(tensor.shape) != wanted:
                raise UsageError(
                    f"{path}: {name} of layer {layer} has the shape {list(tensor.shape)}, and this base needs {wanted}",
                    "Were these maps distilled from another model?",
                )
    targets = {target for entry in published.adapters.values() for target in entry}
    for layer in range(config.num_hidden_layers) if published.adapters else ():
        lacking = sorted(targets - set(published.adapters.get(layer, {})))
        if lacking and layer in published.maps:
            raise UsageError(f"the finetuned file: layer {layer} has no adapter of {lacking[0]}, and others have one")
    beyond = [layer for layer in published.adapters if layer >= config.num_hidden_layers]
    if beyond:
        raise UsageError(f"the finetuned file: has adapters for layer {beyond[0]}, which the base does not have")


def _recipe(published: Published, config: Any, *, lora_alpha: float | None, device: str, dtype: str) -> Recipe:
    """What describes the import in the manifest, as a recipe describes a conversion; its stages have no tokens."""
    kept = [layer for layer in range(config.num_hidden_layers) if layer not in published.maps]
    targets = [t for t in TARGETS if any(t in entry for entry in published.adapters.values())]
    lora = None
    if published.rank is not None:
        alpha = SCALE * published.rank if lora_alpha is None else lora_alpha
        lora = Lora(r=published.rank, alpha=alpha, targets=tuple(targets))
    elif lora_alpha is not None:
        raise UsageError("--lora-alpha: there are no adapters", "Give the finetuned file, or leave it out.")
    return Recipe(
        name="lolcats-import",
        paper=PAPER,
        summary="Published LoLCATs weights on their base model",
        mixer=published.spec(),
        keep_softmax=tuple(kept) or "none",
        context=max(2, min(1024, config.max_position_embeddings)),
        device=device,
        dtype=dtype,
        calibrate=Calibrate(tokens=0),
        align=Align(tokens=0),
        finetune=Finetune(tokens=0, lora=lora),
    )


def _probe(config: Any, recipe: Recipe) -> torch.Tensor:
    """Tokens [2, T] on which what is written is compared with what was made; any will do, if the state is in use."""
    length = min(config.max_position_embeddings, max(PROBE, 3 * recipe.mixer.window + 1))
    return torch.randint(config.vocab_size, (2, length), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def _fill(student: Any, published: Published, lora: Lora | None) -> None:
    """Give the mixers and, as adapters that are not merged yet, the projections what the files hold."""
    parameters, family = dict(student.named_parameters()), lookup(student.config)
    for layer, entry in published.maps.items():
        for name, tensor in entry.items():
            parameters[f"{family.attention_path(layer)}.mixer.{name}"].copy_(tensor)
    if lora is None:
        return
    made = inject(student, lora, seed=0)
    for layer, adapters in published.adapters.items():
        for target, (a, b) in adapters.items():
            for side, tensor in (("A", a), ("B", b)):
                name = f"{family.attention_path(layer)}.{target}.lora_{side}.default.weight"
                if made[name].shape != tensor.shape:
                    raise UsageError(
                        f"the finetuned file: lora_{side} of {target} in layer {layer} has the shape "
                        f"{list(tensor.shape)}, and this base needs {list(made[name].shape)}"
                    )
                made[name].copy_(tensor)


def _report(
    published: Published,
    recipe: Recipe,
    layout: plan.Layout,
    *,
    name: str,
    target: Path,
    dtype: torch.dtype,
    errors: dict[str, dict[str, float]],
) -> dict[str, Any]:
    lora = recipe.finetune.lora if published.adapters else None
    return {
        "out": str(target),
        "model": name,
        "format": "lolcats",
        "family": str(layout.config.model_type),
        "dtype": str(dtype).removeprefix("torch."),
        "layers": {"linear": layout.linear, "softmax": layout.kept},
        "window": published.window,
        "feature_dim": published.feature_dim,
        "lora": None if lora is None else {"r": lora.r, "alpha": lora.alpha, "targets": list(lora.targets)},
        "parameters": {"model": sum(layout.sizes()[key] for key in ("teacher", "new")), "new": layout.sizes()["new"]},
        "state_bytes": sum(row["state_bytes"] for row in layout.rows(dtype.itemsize)),
        "break_even_context": plan.break_even(layout.config, dtype_bytes=dtype.itemsize),
        "merge_error": errors,
        "notes": [*layout.notes, *notes_on(published, layout.kept, lora)],
    }
