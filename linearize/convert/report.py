"""What a conversion says about itself: to the caller, in the model card and in the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from linearize.artifacts.download import origin
from linearize.artifacts.licence import read_licence
from linearize.convert import plan
from linearize.convert.align import match, mean_match
from linearize.convert.export import terms_of
from linearize.convert.finetune import Trained
from linearize.convert.inputs import Inputs
from linearize.convert.stages import RECENT, StageShape, StageState, ends
from linearize.convert.surgery import SurgeryReport


def make_report(
    inputs: Inputs,
    student: Any,
    surgery: SurgeryReport,
    trained: Trained,
    aligned: StageState,
    finetuned: StageState,
    calibration: dict[str, Any] | None,
    errors: dict[str, dict[str, float]],
    seconds: dict[str, float],
) -> dict[str, Any]:
    align, finetune = inputs.shapes
    return {
        "out": str(inputs.out),
        "model": inputs.name,
        "recipe": inputs.recipe.name,
        "family": str(student.config.model_type),
        "task": "masked" if inputs.task.mask is not None else "causal",
        "device": str(inputs.device),
        "dtype": str(inputs.dtype).removeprefix("torch."),
        "teacher_bits": inputs.teacher_bits,
        "keys": surgery.as_dict(),
        "parameters": {
            "model": inputs.sizes["teacher"] + inputs.sizes["new"],
            "new": inputs.sizes["new"],
            "trained": {
                "align": inputs.sizes["align"] if align.steps else 0,
                "finetune": sum(p.numel() for p in trained.parameters.values()),
            },
        },
        "state_bytes": sum(row["state_bytes"] for row in inputs.layout.rows(inputs.dtype.itemsize)),
        "break_even_context": plan.break_even(inputs.layout.config, dtype_bytes=inputs.dtype.itemsize),
        "calibration": calibration,
        "stages": {"align": _stage(align, aligned, inputs), "finetune": _stage(finetune, finetuned, inputs)},
        "layers": match(aligned),
        "mean_match": mean_match(aligned),
        "merge_error": errors,
        "notes": inputs.layout.notes,
        "seconds": seconds,
    }


def _stage(shape: StageShape, state: StageState, inputs: Inputs) -> dict[str, Any]:
    if shape.skipped:
        return {"skipped": shape.skipped, "tokens": 0, "steps": 0}
    figures: dict[str, Any] = {key: value for key, value in state.extra.items() if isinstance(value, float)}
    begin = 1 if shape.name == "align" else RECENT
    first, last = ends(state, first=begin)
    for part in ("ce", "kl"):  # of the steps that the loss is of
        if f"{part}_last" in figures:
            figures[f"{part}_last"] = ends(state, first=begin, name=part)[1]
    if "loss_lowest" in figures:
        figures["loss_lowest"] = min(x for x in (figures["loss_lowest"], first, last) if x is not None)
    return {
        "tokens": shape.tokens,
        "steps": shape.steps,
        "passes_over_the_text": shape.tokens / inputs.windows.size,
        "loss_first": first,
        "loss_last": last,
        **figures,
        "seconds": state.seconds,
    }


def card_facts(inputs: Inputs, report: dict[str, Any]) -> dict[str, Any]:
    """What the model card says, but for the Auto class that the export settles."""
    align, finetune = inputs.shapes
    config = inputs.layout.config
    stages = report["stages"]
    losses = {n: (s["loss_first"], s["loss_last"]) for n, s in stages.items() if s["steps"]}
    return {
        "losses": losses,
        "recipe": inputs.recipe,
        "out": inputs.out.name,
        "text": _text(inputs),
        "terms": [path.name for path in terms_of(inputs.folder)],
        "layers": config.num_hidden_layers,
        "linear": inputs.layout.linear,
        "origin": origin(inputs.folder, inputs.name),
        "licence": _licence(inputs),
        "family": report["family"],
        "parameters": report["parameters"]["model"],
        "state_bytes": report["state_bytes"],
        "break_even": report["break_even_context"],
        "tokens": {"align": align.tokens, "finetune": finetune.tokens},
        "mean_match": report["mean_match"],
        "unmatched": sorted(set(inputs.layout.linear) - {row["layer"] for row in report["layers"]}),
        "dtype": report["dtype"],
        "merge_error": report["merge_error"]["cast"]["max"],
        "teacher_bits": report["teacher_bits"],
        "quantised": report["merge_error"].get("quantised"),
    }


def _text(inputs: Inputs) -> dict[str, Any]:
    """Which text was read, without a path of this machine."""
    described = inputs.source.describe()
    return described if described["kind"] == "hub" else described | {"name": Path(described["name"]).name}


def _licence(inputs: Inputs) -> dict[str, Any] | None:
    return read_licence(inputs.folder, repo=origin(inputs.folder, inputs.name)["repo"])


def provenance(inputs: Inputs, identity: dict[str, str], report: dict[str, Any]) -> dict[str, Any]:
    """What the manifest says beside files and versions. No path of this machine."""
    kept = ("calibration", "stages", "layers", "merge_error", "verification", "parameters", "state_bytes", "keys")
    figures = {key: report[key] for key in kept}
    return {
        "name": inputs.out.name,
        "recipe": inputs.recipe.as_dict(),
        "recipe_digest": inputs.recipe.digest(),
        "teacher_bits": inputs.teacher_bits,
        "teacher": origin(inputs.folder, inputs.name) | {"digest": identity["teacher"], "licence": _licence(inputs)},
        "data": _text(inputs) | {"windows_digest": identity["data"]},
        "figures": figures,
    }
