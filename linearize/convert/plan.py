"""What a conversion would do, and what a model would gain: from configs and headers alone, no weight is loaded."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from linearize.artifacts.quantised import WEIGHT_BYTES
from linearize.convert.checkpoint import KEEP, begun_streaming, saved_step
from linearize.convert.early import path_of, require_out
from linearize.convert.families import check_fit, check_stages, family_of, head_dim, inner_size, require_family
from linearize.convert.finetune_loss import PIECE
from linearize.convert.lora import target_modules, width_of
from linearize.convert.stages import StageShape, stage_shape
from linearize.convert.surgery import (
    LINEAR,
    empty_student,
    mixer_plan,
    student_config,
    trained_names,
)
from linearize.convert.teacher import checked_tensors, teacher_config
from linearize.errors import RefusedError, UsageError
from linearize.modeling.encoder_spec import usable_positions
from linearize.modeling.family_table import PREFIX, lookup
from linearize.recipe import Recipe
from linearize.teacher_bits import require_quantisable, require_teacher_bits

CONTEXTS = (2_048, 32_768, 131_072)
UNSAVED = "the run was killed before it had saved anything: it begins anew"
WEIGHING = ("window_logit", "mix_gate", "far_mass")
"""A mixer's parameters that weigh its branches; the linear branch by itself does not read them."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def stage_shapes(recipe: Recipe, *, alignable: bool) -> tuple[StageShape, StageShape]:
    """Alignment and finetuning; `alignable`: whether the linear layers have parameters that `align.train` names."""
    skip = None if alignable else "no linear layer has a parameter that align.train names"
    align = stage_shape(
        "align",
        tokens=recipe.align.tokens,
        batch_tokens=recipe.align.batch_tokens,
        context=recipe.context,
        skip=skip,
    )
    finetune = stage_shape(
        "finetune",
        tokens=recipe.finetune.tokens,
        batch_tokens=recipe.finetune.batch_tokens,
        context=recipe.context,
        after=align,
    )
    return align, finetune


def make_plan(
    model: str | os.PathLike[str],
    *,
    recipe: Recipe,
    data: str | None = None,
    out: str | os.PathLike[str] | None = None,
    stream: bool | None = None,
    teacher_bits: int | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Layers, parameters, tokens, memory and disk of a conversion; nothing is started or written.

    `out` is refused as the conversion would refuse it. With `resume` it must have an unfinished run of this recipe;
    that model and text are the same, too, is only known once they are read.

    Returns plain values: family, layers [{index, from, to, heads, kv_heads, head_dim, feature_dim, state_bytes,
    new_parameters}], parameters, new_parameters, trained {align, finetune}, tokens and steps of both stages, notes,
    memory_bytes (of training, an estimate for one window at a time), disk_bytes, streamed (whether a layer at a time:
    as `stream` says; None: where it must be), hidden_bytes (of the disk, what hidden states take in streaming),
    teacher_bits (of the frozen weights while it trains; None: as they are) and resumes ({stage, step} that `resume`
    would go on from, step in layers where it streams; None: from the beginning).

    Raises:
        UsageError: no such model, an unsupported family, a recipe that does not fit, or nothing to resume.
        RefusedError: `out` cannot be made or holds something, the run there is another one, or the checkpoint is
            incomplete.
    """
    from linearize.artifacts.load import check_checkpoint, resolve
    from linearize.convert.stream import planned_way
    from linearize.data import load_source
    from linearize.modeling.configuration_linearized import kv_bytes

    require_teacher_bits(teacher_bits, stream=stream)
    target = None if out is None else path_of(out)
    if target is not None:
        require_out(target, resume=resume)
        if stream is None and resume:
            stream = begun_streaming(target)
    folder = resolve(model)
    require_family(folder)
    check_checkpoint(folder, finite=False)
    config, dtype = teacher_config(folder)
    if teacher_bits is not None:
        require_quantisable(config.model_type)
    if data is not None:
        load_source(data, limit_bytes=1, packed=True)  # that it can be read, and no more
    layout = Layout.of(config, recipe)
    dropped = checked_tensors(folder, config)
    export = dtype if recipe.dtype == "auto" else recipe.dtype
    sizes = layout.sizes()
    align, finetune = stage_shapes(recipe, alignable=sizes["align"] > 0)
    trained = {shape.name: sizes[shape.name] if shape.steps else 0 for shape in (align, finetune)}
    way, remarks = planned_way(
        config, recipe, layout, shapes=(align, finetune), stored=dtype, asked=stream, teacher_bits=teacher_bits
    )
    if target is not None:
        remarks += _full(target, way.disk_bytes)
    again = None
    if target is not None and resume:
        again = saved_step(target, recipe=recipe, streamed=way.streamed, teacher_bits=teacher_bits)
        remarks += [] if again else [UNSAVED]
    rows = layout.rows(DTYPE_BYTES[export])
    state = sum(row["state_bytes"] for row in rows)
    return {
        "model": str(model),
        "recipe": recipe.name,
        "family": config.model_type,
        "layers": rows,
        "parameters": sizes["teacher"] + sizes["new"],
        "new_parameters": sizes["new"],
        "trained": trained,
        "context": recipe.context,
        "tokens": {"align": align.tokens, "finetune": finetune.tokens},
        "steps": {"align": align.steps, "finetune": finetune.steps},
        "skipped": {s.name: s.skipped for s in (align, finetune) if s.skipped},
        "notes": layout.notes + remarks,
        "dropped": dropped,
        "export_dtype": export,
        "state_bytes": state,
        "kv_bytes_at_context": kv_bytes(config, recipe.context, dtype_bytes=DTYPE_BYTES[export]),
        "memory_bytes": way.memory_bytes,
        "disk_bytes": way.disk_bytes,
        "streamed": way.streamed,
        "hidden_bytes": way.hidden_bytes,
        "teacher_bits": teacher_bits,
        "resumes": again,
        "data": data,
        "out": None if out is None else str(out),
    }


def _full(out: Path, size: int) -> list[str]:
    """What to note where the disk of OUT has too little room. The plan may be for another machine, so it is shown."""
    from linearize.artifacts.atomic import require_free_space

    try:
        require_free_space(out, size)
    except RefusedError as error:
        return [f"not on this disk: {error.message}"]
    return []


def inspect(model: str | os.PathLike[str], recipe: Recipe | None = None) -> dict[str, Any]:
    """What a model is and, with a recipe or for a converted model, what its state costs against a key/value cache.

    Returns family, parameters, dtype, layers, kv_bytes {tokens: bytes} of the teacher's cache for one sequence, and,
    where there are linear layers, state_bytes, softmax_kv_bytes {tokens: bytes} of the layers that stay softmax, and
    break_even_context: the tokens from which the state is smaller than the cache it replaces.
    """
    from linearize.artifacts.load import check_checkpoint, resolve
    from linearize.artifacts.weights import read_tensors
    from linearize.modeling.configuration_linearized import head_sizes, kv_bytes, state_bytes

    folder = resolve(model)
    require_family(folder, converted=True)
    check_checkpoint(folder, finite=False)
    config, dtype = teacher_config(folder)
    converted = str(config.model_type).startswith(PREFIX)
    if converted and recipe is not None:
        raise UsageError(f"{model} is already linearized", "Inspect it without --recipe")
    if not converted:
        family_of(config)
    found: dict[str, Any] = {
        "model": str(model),
        "family": config.model_type,
        "parameters": sum(info.elements for _, info in read_tensors(folder).values()),
        "dtype": dtype,
        "heads": config.num_attention_heads,
        "kv_heads": head_sizes(config)[1],
        "head_dim": head_dim(config),
        "context": usable_positions(config),
    }
    width = DTYPE_BYTES[dtype]
    if lookup(config).bidirectional:
        found["notes"] = [lookup(config).note]
    found["kv_bytes"] = {str(n): kv_bytes(config, n, dtype_bytes=width) for n in CONTEXTS}
    if recipe is None and not converted:
        return found | {"layers": config.num_hidden_layers}
    if recipe is not None:
        layout = Layout.of(config, recipe, training=False)
        config = layout.config
        found |= {"recipe": recipe.name, "layers": layout.rows(width), "notes": layout.notes}
        found["new_parameters"] = layout.sizes()["new"]
    else:
        found["layers"] = [{"index": i, "mixer": kind} for i, kind in enumerate(config.layer_mixers)]
    linear = len(config.linear_layers)
    found["state_bytes"] = state_bytes(config, dtype_bytes=width) if linear else 0
    softmax = config.num_hidden_layers - linear
    found["softmax_kv_bytes"] = {str(n): kv_bytes(config, n, dtype_bytes=width, layers=softmax) for n in CONTEXTS}
    found["break_even_context"] = break_even(config, dtype_bytes=width)
    return found


def break_even(config: Any, *, dtype_bytes: int) -> int | None:
    """Tokens from which the state is smaller than the key/value cache it replaces; None: it replaces none."""
    from linearize.modeling.configuration_linearized import kv_bytes, state_bytes

    linear = len(config.linear_layers)
    replaced = kv_bytes(config, 1, dtype_bytes=dtype_bytes, layers=linear)
    return math.ceil(state_bytes(config, dtype_bytes=dtype_bytes) / replaced) if replaced else None


class Layout:
    """A teacher's config and a recipe, laid out layer by layer, with the student on the meta device."""

    def __init__(self, config: Any, recipe: Recipe, notes: list[str]) -> None:
        self.recipe, self.notes = recipe, notes
        layers = config.num_hidden_layers
        self.mixers = mixer_plan(layers, recipe.softmax_layers(layers))
        self.kept = [i for i, kind in enumerate(self.mixers) if kind != LINEAR]
        self.linear = [i for i, kind in enumerate(self.mixers) if kind == LINEAR]
        self.config = student_config(config, spec=recipe.mixer, layer_mixers=self.mixers)
        self.student = empty_student(self.config)

    @classmethod
    def of(cls, config: Any, recipe: Recipe, *, training: bool = True) -> Layout:
        """Check that the recipe fits, then lay it out. Without `training` its context does not matter."""
        kept = set(recipe.softmax_layers(config.num_hidden_layers))
        linear = [i for i in range(config.num_hidden_layers) if i not in kept]
        context = recipe.context if training else None
        notes = check_fit(config, spec=recipe.mixer, linear_layers=linear, context=context)
        check_stages(lookup(config), recipe)
        if recipe.automatic:
            notes = [*notes, f"keep_softmax {recipe.keep_softmax}: the conversion measures which layers stay softmax; "
                             "the ones shown stand in for them"]  # fmt: skip
        layout = cls(config, recipe, notes)
        if training:
            layout.require_gradients()
        return layout

    def require_gradients(self) -> None:
        """Refuse stages of which a step, or all of them, would have nothing to train.

        Raises:
            UsageError: nothing is trained, or nothing that the linear branch alone reads where a step runs it alone.
        """
        from linearize.convert.align import aligned_names

        align, finetune = self.recipe.align, self.recipe.finetune
        hidden = {"align.window_dropout": align.window_dropout > 0, "align.branch": align.branch != "mix"}
        aligned = aligned_names(self.student, align, self.linear)
        if align.tokens and any(hidden.values()):
            key = next(key for key, alone in hidden.items() if alone)
            _require_read(aligned, key=key, train="align.train")
        if not finetune.tokens or finetune.lora is not None:
            return
        full = trained_names(self.student, finetune.full, key="finetune.full")
        if not full:
            raise UsageError("finetune: nothing of this model is trained", "Set finetune.lora, or finetune.tokens=0")
        if finetune.window_dropout:
            _require_read(full, key="finetune.window_dropout", train="finetune.full")

    def rows(self, dtype_bytes: int) -> list[dict[str, Any]]:
        """One row a layer."""
        from linearize.modeling.configuration_linearized import head_sizes, layer_state_bytes

        heads, kv_heads, width = head_sizes(self.config)
        state = layer_state_bytes(self.config, self.recipe.mixer, dtype_bytes=dtype_bytes)
        rows, family = [], lookup(self.config)
        for index, kind in enumerate(self.mixers):
            linear = kind == LINEAR
            mixer = family.attention_of(self.student, index).mixer if linear else None
            rows.append(
                {
                    "index": index,
                    "from": "softmax",
                    "to": kind,
                    "heads": heads,
                    "kv_heads": kv_heads,
                    "head_dim": width,
                    "feature_dim": mixer.features if mixer is not None else None,
                    "state_bytes": state if linear else 0,
                    "new_parameters": sum(p.numel() for p in mixer.parameters()) if mixer is not None else 0,
                }
            )
        return rows

    def sizes(self) -> dict[str, int]:
        """Parameters: of the teacher, new, trained in alignment and in finetuning, and owned besides the teacher's; of
        the teacher's linear layers, which can be quantised; and of modules with an adapter, which are merged."""
        from linearize.convert.align import aligned_names

        recipe = self.recipe
        named = {name: p.numel() for name, p in self.student.named_parameters()}
        new = sum(size for name, size in named.items() if ".mixer." in name)
        aligned = aligned_names(self.student, recipe.align, self.linear)
        full = trained_names(self.student, recipe.finetune.full, key="finetune.full")
        lora, adapted = 0, 0
        if recipe.finetune.lora is not None:
            for name in target_modules(self.student, recipe.finetune.lora.targets):
                module = self.student.get_submodule(name)
                lora += recipe.finetune.lora.r * width_of(module)
                adapted += module.weight.numel()
        return {
            "teacher": sum(named.values()) - new,
            "new": new,
            "align": sum(named[name] for name in aligned),
            "finetune": sum(named[name] for name in full) + lora,
            "own": sum(named[name] for name in {*aligned, *full} if ".mixer." not in name) + new + lora,
            "linear": sum(
                module.weight.numel()
                for name, module in self.student.named_modules()
                if isinstance(module, (nn.Linear, Conv1D))
                and lookup(self.config).layer_index(name) is not None
                and ".mixer." not in name
            ),
            "adapted": adapted,
        }


def _require_read(names: list[str], *, key: str, train: str) -> None:
    """Refuse `key`, which runs linear branches alone, where they read none of the parameters `names`."""
    weighing = [kind for name in names for kind in WEIGHING if f".mixer.{kind}" in name]
    if names and len(weighing) == len(names):
        raise UsageError(
            f"{key}: the linear branch alone trains nothing here, for {weighing[0]} only weighs it against the window",
            f"Use {key}={'mix' if key == 'align.branch' else 0}, or name projections in {train} too",
        )


def training_bytes(
    config: Any, recipe: Recipe, sizes: dict[str, int], *, stored: str = "float32", teacher_bits: int | None = None
) -> int:
    """Memory of training, one window at a time: an estimate, usually within a third.

    With `teacher_bits` the export may need more: all weights in the type of the files, `stored`, and in float32 those
    that adapters are merged into.
    """
    trained = max(sizes["align"], sizes["finetune"])
    # fp32: teacher and frozen student share storage; own copies; gradient, moments and first values of what is trained.
    weights = 4 * (sizes["teacher"] + sizes["own"] + 4 * trained)
    least = 0
    if teacher_bits is not None:
        weights -= round((4 - WEIGHT_BYTES[teacher_bits]) * sizes["linear"])
        least = DTYPE_BYTES[stored] * (sizes["teacher"] + sizes["new"]) + 4 * sizes["adapted"]
    layers = 2 if recipe.gradient_checkpointing else config.num_hidden_layers
    # Per token and layer: about 16 hidden vectors, 3 of the MLP's, and the mixer's features, in mixed precision.
    attention = config.num_attention_heads * head_dim(config)
    per_layer = 48 * config.hidden_size + 12 * inner_size(config) + 32 * attention
    logits = 16 * min(PIECE, recipe.context) * config.vocab_size
    return max(weights + recipe.context * per_layer * layers, least) + logits


def disk_bytes(sizes: dict[str, int], dtype_bytes: int) -> int:
    """Disk that a conversion needs at most: the export, and checkpoints (KEEP of them and one being written)."""
    trained = max(sizes["align"], sizes["finetune"])
    return (sizes["teacher"] + sizes["new"]) * dtype_bytes + (KEEP + 1) * 4 * (sizes["own"] + 2 * trained) + (16 << 20)
