"""Norms, gated units and rotations of the native code, each as one kernel forwards and one backwards.

Transformers writes them out in torch, a launch and a pass over memory for every operation, and keeps what each of them
read for the way back. What a module of the native family computes is not known from its name. A blank one is shown
random numbers, and only where it gives the very numbers of our formula, bit by bit in bfloat16, is it made to call the
kernel; under torch.compile, in torch.func's transforms and on a CPU it runs its own code.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

try:
    from linearize_kernels.backend import pick
    from linearize_kernels.gated_unit import ACTIVATIONS, activated, gated_unit
    from linearize_kernels.rms_norm import WIDEST, rms_norm
    from linearize_kernels.rotate import rotate
except ImportError:  # an exported model without linearize, or beside an older one: the native code serves
    pick = None  # type: ignore[assignment]

ROTATION = "apply_rotary_pos_emb"
"""What the native attention calls to rotate queries and keys."""
EPSILONS = ("variance_epsilon", "eps")
CHANNELS = 24
"""Of the blank modules."""


class OneKernel:
    """A module of the native family whose forward is one kernel, where that serves."""

    native: type

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As one of the native class: this one is made when it is needed, and has no name to be found by."""
        if type(self) is not quick_class(self.native):
            return super().__reduce_ex__(protocol)
        return _rebuilt, (self.native,), self.__dict__


class OneKernelRotation(OneKernel):
    """Attention, whose queries and keys are rotated by one kernel."""

    rotated: Any
    """The native forward with another rotation, as a static method."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the native forward."""
        if torch.compiler.is_compiling():  # which asks where a function's names come from
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        return self.rotated(self, *args, **kwargs)


class OneKernelNorm(OneKernel):
    """RMSNorm."""

    form: tuple[bool, bool]
    """`offset` and `late` of rms_norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the native forward."""
        weight: Tensor = self.weight  # type: ignore[attr-defined]
        eps, fits = epsilon(self), hidden_states.dtype == weight.dtype and len(weight) <= WIDEST
        if eps is not None and fits and serves(hidden_states, weight):
            offset, late = self.form
            return rms_norm(hidden_states, weight, eps, offset=offset, late=late)
        return super().forward(hidden_states)  # type: ignore[misc]


class OneKernelUnit(OneKernel):
    """An MLP with a gate: three projections, and one kernel between them."""

    joined: str
    """The projection that gives gate and up side by side; empty: there are two."""
    activation: str
    """Where its activation function lies."""

    def forward(self, x: Tensor) -> Tensor:
        """As the native forward."""
        name = activation_name(getattr(self, self.activation)) if serves(x) else None
        if name is None:
            return super().forward(x)  # type: ignore[misc]
        if self.joined:
            gate, up = getattr(self, self.joined)(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)  # type: ignore[attr-defined]
        between = gated_unit(gate, up, name) if gate.dtype == up.dtype else getattr(self, self.activation)(gate) * up
        return self.down_proj(between)  # type: ignore[attr-defined]


def serves(*tensors: Tensor) -> bool:
    """Whether kernels may compute these tensors: they can read them, and nothing but autograd would see it."""
    if pick is None or torch.compiler.is_compiling() or _transforms_active():
        return False
    if any(type(x) not in (Tensor, nn.Parameter) or x.dtype == torch.float64 for x in tensors):
        return False
    return pick("auto", *tensors) == "triton"


def _transforms_active() -> bool:
    """Whether torch.func is at work (grad, vmap, jvp), for which the ops have no rules; what it wraps looks plain."""
    active: Callable[[], bool] | None = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and active()


def quicken(model: nn.Module) -> None:
    """Make the norms, gated units and attentions of a native model call kernels, those whose formula is known."""
    for module in model.modules():
        native: Any = type(module)
        if (kind := quick_class(native)) is not None:
            module.__class__ = kind


@cache
def quick_class(native: type) -> type | None:
    """The class that takes the place of a native one, or None."""
    if pick is None or issubclass(native, OneKernel):
        return None
    own: dict[str, Any] = {"native": native, "__module__": native.__module__, "__doc__": native.__doc__}
    if native.__name__.endswith("RMSNorm"):
        form = norm_form(native)
        return None if form is None else type(native.__name__, (OneKernelNorm, native), own | {"form": form})
    if native.__name__.endswith("MLP"):
        found = unit_form(native)
        if found is not None:
            own |= {"joined": found[0], "activation": found[1]}
            return type(native.__name__, (OneKernelUnit, native), own)
    if native.__name__.endswith("Attention"):
        forward = rotating(native.forward)  # type: ignore[attr-defined]
        if forward is not native.forward:  # type: ignore[attr-defined]
            own |= {"rotated": staticmethod(forward)}
            return type(native.__name__, (OneKernelRotation, native), own)
    return None


def _rebuilt(native: type) -> Any:
    kind: Any = quick_class(native) or native
    return kind.__new__(kind)


def norm_form(native: type) -> tuple[bool, bool] | None:
    """`offset` and `late` of rms_norm by which a class of norms computes, or None."""
    draw = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, CHANNELS, generator=draw, device="cpu").bfloat16() for n in (8, 1))
    blank = _blank(native, weight=weight[0], **dict.fromkeys(EPSILONS, 0.3))
    found = _tried(native, blank, x)
    for form in ((False, False), (False, True), (True, False), (True, True)):
        offset, late = form
        if found is not None and torch.equal(
            found, rms_norm(x, weight[0], 0.3, offset=offset, late=late, backend="torch")
        ):
            return form
    return None


def unit_form(native: type) -> tuple[str, str] | None:
    """The joined projection (or "") and the activation's attribute of a class of MLPs with a gate, or None."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(8, CHANNELS, generator=draw, device="cpu").bfloat16()
    gate, up, down = (torch.randn(CHANNELS, CHANNELS, generator=draw, device="cpu").bfloat16() for _ in range(3))
    wanted = activated(x @ gate, "silu") * (x @ up) @ down
    given: dict[str, Any] = {name: _times(y) for name, y in (("gate_proj", gate), ("up_proj", up), ("down_proj", down))}
    beside = {"gate_up_proj": _times(torch.cat((gate, up), dim=1)), "down_proj": given["down_proj"]}
    for name in ("act_fn", "activation_fn"):
        for joined, projections in (("", given), ("gate_up_proj", beside)):
            found = _tried(native, _blank(native, **projections, **{name: _silu}), x)
            if found is not None and torch.equal(found, wanted):
                return joined, name
    return None


def activation_name(function: Any) -> str | None:
    """The name by which gated_unit knows an activation function, or None."""
    kind: Any = type(function)
    return _activation_name(kind) if isinstance(function, nn.Module) else None


@cache
def _activation_name(kind: type) -> str | None:
    """Of a class of activations that is made without arguments."""
    x = torch.linspace(-6.0, 6.0, 97, device="cpu")
    try:
        found = kind()(x)
    except Exception:  # whatever a class of somebody else's does not like
        return None
    for name in ACTIVATIONS:
        if isinstance(found, Tensor) and torch.allclose(found, activated(x, name), rtol=1e-6, atol=1e-6):
            return name
    return None


def epsilon(module: Any) -> float | None:
    """What a norm adds to the mean square; None: it is kept under no name that is known."""
    found = next((getattr(module, name) for name in EPSILONS if hasattr(module, name)), None)
    return found if isinstance(found, float) else None


def rotating(forward: Any) -> Any:
    """A native attention's forward, whose rotation of queries and keys is one kernel; the same function where its
    rotation is not RoPE as we know it.
    """
    known: dict[str, Any] = getattr(forward, "__globals__", {})
    native: Any = known.get(ROTATION)
    if pick is None or native is None or ROTATION not in forward.__code__.co_names or not _is_rope(native):
        return forward
    mixed = _is_rope(native, torch.float32)  # as under autocast, where tables are of the residual stream's dtype

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        plain = not args and not kwargs and q.ndim == 4 and q.dtype == k.dtype and cos.dtype == sin.dtype
        plain = plain and (cos.dtype == q.dtype or (mixed and cos.dtype == torch.float32))
        if plain and serves(q, k, cos, sin):
            return rotate(q, k, cos, sin)
        return native(q, k, cos, sin, *args, **kwargs)

    made = FunctionType(
        forward.__code__, {**known, ROTATION: apply_rotary_pos_emb}, forward.__name__, forward.__defaults__,
        forward.__closure__,
    )  # fmt: skip
    made.__kwdefaults__ = forward.__kwdefaults__
    return made


def _is_rope(native: Callable[..., Any], tables: torch.dtype = torch.bfloat16) -> bool:
    """Whether a function rotates bfloat16 as `rotate` does by `tables`: whole heads, and parts if it takes them."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, n, 5, CHANNELS, generator=draw, device="cpu").bfloat16() for n in (4, 2))
    for turned in (CHANNELS, CHANNELS // 3):
        cos, sin = (torch.randn(1, 5, turned, generator=draw, device="cpu").to(tables) for _ in range(2))
        try:
            found = native(q, k, cos, sin)
        except Exception:  # another signature, or a family that rotates whole heads alone
            return turned < CHANNELS
        wanted = rotate(q, k, cos, sin, backend="torch")
        if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, wanted, strict=True)):
            return False
    return True


def _blank(native: Any, **attributes: Any) -> Any:
    """A module of a class with nothing but some attributes, which are tensors and functions, not parameters."""
    made = native.__new__(native)
    nn.Module.__init__(made)
    for name, value in attributes.items():
        object.__setattr__(made, name, value)
    return made


def _tried(native: Any, blank: Any, x: Tensor) -> Tensor | None:
    try:
        with torch.no_grad():
            found = native.forward(blank, x)
    except Exception:  # another module than it is taken for
        return None
    return found if isinstance(found, Tensor) else None


def _times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: x @ matrix


def _silu(x: Tensor) -> Tensor:
    return activated(x, "silu")
