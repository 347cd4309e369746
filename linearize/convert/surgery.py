"""A student out of a loaded teacher: same weights, new mixers, every key accounted for.

The student is never loaded from the teacher's files: parameters that are missing there would come back as garbage. It
is built empty, takes each of the teacher's tensors by name, and its mixers are initialised here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from linearize.artifacts.quantised import quantised_modules
from linearize.convert.families import family_of, lies_in, module_paths
from linearize.convert.optim import derived_seed
from linearize.errors import VerificationError
from linearize.modeling.family_table import lookup
from linearize.modeling.mixer_spec import MixerSpec

LINEAR, SOFTMAX = "linear", "softmax"


@dataclass(frozen=True, kw_only=True)
class SurgeryReport:
    """What became of every key."""

    mapped: tuple[str, ...]
    """Taken from the teacher, unchanged."""
    dropped: dict[str, str]
    """In the teacher's files and not in the model, with the rule."""
    new: tuple[str, ...]
    """Initialised here."""

    def as_dict(self) -> dict[str, Any]:
        """Counts, rules and new names, as plain values."""
        return {"mapped": len(self.mapped), "dropped": self.dropped, "new": len(self.new)}


def mixer_plan(num_layers: int, softmax_layers: Collection[int]) -> list[str]:
    """`linear` or `softmax` for every layer."""
    return [SOFTMAX if index in softmax_layers else LINEAR for index in range(num_layers)]


def student_config(teacher_config: Any, *, spec: MixerSpec, layer_mixers: Sequence[str]) -> Any:
    """The config of the converted model; the teacher's is left as it is."""
    from linearize.modeling.configuration_linearized import linearized_config

    return linearized_config(teacher_config, layer_mixers=list(layer_mixers), spec=spec)


def empty_student(config: Any) -> Any:
    """The converted model without storage (meta device), in the family of its config."""
    from linearize.modeling.modeling_linearized import MODELS

    # Mixers draw start values even here, where they are lost: the caller's random state is not to notice.
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = MODELS[lookup(config).model_type](config)
    model.tie_weights()
    return model


def linearize_model(
    teacher: Any,
    *,
    spec: MixerSpec,
    layer_mixers: Sequence[str],
    seed: int,
    own: Callable[[str], bool] = lambda name: True,
    exact: Callable[[str], Tensor] | None = None,
) -> tuple[Any, SurgeryReport]:
    """Build the student of a loaded teacher, on its device and in its dtype (mixers: fp32).

    `own(name)` says which of the teacher's tensors the student gets a copy of, because they will be trained; the others
    share the teacher's storage, so a frozen weight is held once. With every layer `softmax` the student computes
    exactly what the teacher does. Quantised modules are shared as they are; `exact(name)` gives a tensor of theirs that
    the student is to own, as it was before.

    Raises:
        UsageError: unsupported family. VerificationError: a key that is not accounted for, or a bad new weight.
    """
    family = family_of(teacher.config)
    config = student_config(teacher.config, spec=spec, layer_mixers=layer_mixers)
    student = empty_student(config)
    linear = [i for i, kind in enumerate(layer_mixers) if kind == LINEAR]
    report = fill_student(student, teacher, linear, seed=seed, own=own, exact=exact)
    student.config._attn_implementation = family.implementation
    if hasattr(teacher, "generation_config"):  # an encoder generates nothing
        student.generation_config = teacher.generation_config
    student.train(teacher.training)  # dropout of the native layers
    return student, report


def fill_student(
    student: Any,
    teacher: Any,
    linear: Collection[int],
    *,
    seed: int,
    own: Callable[[str], bool],
    exact: Callable[[str], Tensor] | None = None,
) -> SurgeryReport:
    """Give an empty student its values: the teacher's by name, and start values for the mixers of the layers `linear`.

    Both may be parts of models, as long as they are the same parts.

    Raises:
        VerificationError: a key that is not accounted for, or a bad new weight.
    """
    device = next(teacher.parameters()).device
    mixers = {}
    for name, _ in student.named_modules():
        numbers = [int(part) for part in name.split(".") if part.isdecimal()]
        if name.endswith(".mixer") and numbers and numbers[0] in linear:
            mixers[name] = numbers[0]
    new = _initialise(student, mixers, seed=seed, device=device)
    mapped = _adopt(student, teacher, new, own, exact)
    if hasattr(student, "tie_weights"):
        student.tie_weights()
    report = SurgeryReport(mapped=tuple(sorted(mapped)), dropped={}, new=tuple(sorted(new)))
    _check(student, report)
    return report


def _initialise(student: Any, mixers: dict[str, int], *, seed: int, device: torch.device) -> set[str]:
    """Start every mixer from a seed of its layer, on the CPU so that all devices agree; the names made."""
    new: set[str] = set()
    for path, layer in mixers.items():
        mixer = student.get_submodule(path)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derived_seed(seed, "mixer", layer))
            mixer.to_empty(device="cpu").float()
            mixer.reset_parameters()
        mixer.to(device)
        new |= {f"{path}.{name}" for name, _ in (*mixer.named_parameters(), *mixer.named_buffers())}
    return new


def _adopt(
    student: Any,
    teacher: Any,
    new: set[str],
    own: Callable[[str], bool],
    exact: Callable[[str], Tensor] | None,
) -> set[str]:
    """Give the student every parameter and buffer of the teacher, by name, and every quantised module as it is."""
    theirs: dict[str, Tensor] = dict(teacher.named_parameters()) | dict(teacher.named_buffers())
    ours = dict(student.named_parameters()) | dict(student.named_buffers())
    whole: set[str] = set()
    for path, module in quantised_modules(teacher).items():
        names = {f"{path}.{name}" for name, _ in module.named_parameters()}
        if any(map(own, names)):
            assert exact is not None
            theirs |= {name: exact(name) for name in names}
            continue
        parent, _, leaf = path.rpartition(".")
        setattr(student.get_submodule(parent), leaf, module)
        whole |= names
    theirs, ours = ({n: t for n, t in tensors.items() if n not in whole} for tensors in (theirs, ours))
    left = sorted(set(theirs) - set(ours))
    if left:
        raise VerificationError(f"the student has no place for the teacher's {left[0]}")
    lacking = sorted(set(ours) - set(theirs) - new)
    if lacking:
        raise VerificationError(f"nothing gives the student's {lacking[0]} a value")
    for name, tensor in theirs.items():
        if ours[name].shape != tensor.shape:
            raise VerificationError(f"{name}: teacher {tuple(tensor.shape)}, student {tuple(ours[name].shape)}")
        parent, _, leaf = name.rpartition(".")
        module = student.get_submodule(parent)
        value = tensor.detach().clone() if own(name) else tensor.detach()
        if leaf in module._parameters:
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        else:
            module._buffers[leaf] = tensor.detach().clone()
    return set(theirs) | whole


def _check(student: Any, report: SurgeryReport) -> None:
    for name, tensor in (*student.named_parameters(), *student.named_buffers()):
        if tensor.is_meta:
            raise VerificationError(f"{name} was left without a value")
    tensors = dict(student.named_parameters()) | dict(student.named_buffers())
    for name in report.new:
        if not bool(torch.isfinite(tensors[name]).all()):
            raise VerificationError(f"{name} was initialised with a value that is not finite")


def trained_names(
    student: Any, wanted: Collection[str], layers: Collection[int] | None = None, *, key: str = "train"
) -> list[str]:
    """Names of the parameters that lie in a module called as one of `wanted` (mixer, q_proj, ...), in order.

    `layers` keeps to those decoder layers; None: all. `key` is the recipe's, for errors.

    Raises:
        UsageError: a part of what the family keeps in one module, without the rest.
    """
    family = lookup(student.config)
    paths = module_paths(family, wanted, key=key)
    return [
        name
        for name, _ in student.named_parameters()
        if any(lies_in(name, path) for path in paths) and (layers is None or family.layer_index(name) in layers)
    ]
