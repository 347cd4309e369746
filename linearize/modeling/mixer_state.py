"""The mixer's memory between calls: extend it by many tokens, or by one.

Tokens live in the ring of the last two blocks while the window can see them. Where the linear branch reads only what
lies outside the window, a block enters the state as a whole, the moment it can no longer be seen.
Everything is written in place, so that addresses stay: a CUDA graph of one step then serves every step.
Shapes as in mixer.py; Z sinks, W the window's block.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .cache_linearized import lasting
from .mixer_decode import decode_token
from .softcap import step_window

try:
    from linearize_kernels import step_delta, step_linear
except ImportError:  # an exported model without linearize
    from .step import step_delta, step_linear  # type: ignore[import-not-found,no-redef]

if TYPE_CHECKING:
    from .mixer import Mixer


def take(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Pick along the token axis: x [B, S, M, ...], index [B, L] -> [B, S, L, ...]."""
    shape = (x.shape[0], x.shape[1], index.shape[1], *x.shape[3:])
    return x.gather(2, index.reshape(index.shape[0], 1, -1, *([1] * (x.ndim - 3))).expand(shape))


def keep_rows(rows: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Shape a mask so that it multiplies x: [B, L] against [B, S, L, ...]."""
    return rows.reshape(rows.shape[0], 1, -1, *([1] * (x.ndim - 3)))


class MixerState:
    """One mixer working on one cache layer (a LinearStateLayer)."""

    def __init__(self, mixer: Mixer, cache: Any) -> None:
        self.mixer, self.cache, self.tensors = mixer, cache, cache.tensors

    def create(self, q: torch.Tensor, k: torch.Tensor) -> None:
        """Make an empty memory for q's batch, device and dtype."""
        mixer, spec, batch = self.mixer, self.mixer.spec, q.shape[0]
        heads, kv_heads, width = mixer.state_heads, mixer.num_kv_heads, mixer.head_dim

        precise = torch.float64 if q.dtype == torch.float64 else torch.float32

        def full(*shape: int, dtype: torch.dtype = precise) -> torch.Tensor:
            with lasting():
                return torch.zeros(batch, *shape, dtype=dtype, device=q.device)

        made = {"state": full(heads, mixer.features, width), "position": full(dtype=torch.long)}
        if mixer.value_size > width:
            made["z"] = full(heads, mixer.features)
            self.cache.workspace["z_next"] = full(heads, mixer.features)
        if spec.window:
            made |= {f"ring_{x}": full(kv_heads, 2 * spec.window, width, dtype=k.dtype) for x in "kv"}
        if spec.sinks:
            made |= {f"sink_{x}": full(kv_heads, spec.sinks, width, dtype=k.dtype) for x in "kv"}
        if spec.lagged and spec.decay != "none":
            channels = (mixer.features,) if spec.decay == "channel" else ()
            made["ring_g"] = full(heads, 2 * spec.window, *channels)
        if spec.lagged and spec.write == "delta":
            made["ring_beta"] = full(heads, 2 * spec.window)
        self.tensors.update(made)
        self.cache.is_initialized = True

    def _put(self, name: str, value: torch.Tensor) -> None:
        """Write a tensor in place; where gradients flow through it, put it in the old one's place instead."""
        if torch.is_grad_enabled() and value.requires_grad:
            self.tensors[name] = value
        elif self.tensors[name].data_ptr() != value.data_ptr():
            self.tensors[name].copy_(value)

    def _joined(self) -> torch.Tensor:
        """The state as the linear branch takes it, the denominator its last column: [B, S, F, V]."""
        state, z = self.tensors["state"], self.tensors.get("z")
        return state if z is None else torch.cat((state, z.unsqueeze(-1)), dim=-1)

    def _keep(self, joined: torch.Tensor) -> None:
        """The reverse of `_joined`."""
        width = self.mixer.head_dim
        self._put("state", joined[..., :width])
        if "z" in self.tensors:
            self._put("z", joined[..., width])

    def read_token(self, q, k, v, inputs, rotation) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Read one token, arguments as Mixer.forward, by the decode kernel where it can serve; out [B, H, 1, D]."""
        self._check_batch(q.shape[0])
        self.cache.settle()
        out = decode_token(self.mixer, self.cache, q, k, v, inputs, rotation)
        if out is None:
            return self.step(*self.mixer.token_parts(q, k, v, inputs, rotation))
        self.cache.unsettled = True
        self.cache.count(1)
        if not self.cache.shared:
            self.cache.settle()
        return out

    def _check_batch(self, batch: int) -> None:
        held = self.tensors["position"].shape[0]
        if batch != held:
            raise ValueError(
                f"the cache holds {held} rows, the input {batch} sequences; for n beams or samples of each row, call "
                "cache.batch_repeat_interleave(n) first. Packed documents have no cache"
            )

    # -------------------------------------------------------------------------------------------------- many tokens

    def extend(self, q, k, v, q_lin, k_lin, g, beta, gate, valid) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Read tokens [B, ., L, .], of which `valid` [B, L] are real (None: all); returns out [B, H, L, D]."""
        mixer, spec, tensors = self.mixer, self.mixer.spec, self.tensors
        batch, length = k.shape[0], k.shape[2]
        self._check_batch(batch)
        self.cache.settle()
        before = tensors["position"]
        if valid is None:
            after = before + length
        else:
            after = before + valid.sum(1)
            g = None if g is None else g.masked_fill(~keep_rows(valid, g), 0.0)
            beta = None if beta is None else beta.masked_fill(~keep_rows(valid, beta), 0.0)
        self._store_sinks(k, v, before, after)

        window = None
        if spec.window:
            region = self._region(before, length)
            parts = {"k": region(k, "ring_k"), "v": region(v, "ring_v")}
            parts |= {"g": region(g, "ring_g")} if "ring_g" in tensors else {}
            parts |= {"beta": region(beta, "ring_beta")} if "ring_beta" in tensors else {}
            q_region = region(q, None)
            sink = (tensors["sink_k"].to(q.dtype), tensors["sink_v"].to(q.dtype)) if spec.sinks else (None, None)
            first_block = region.start // spec.window
            found = mixer.window_branch(q_region, parts["k"], parts["v"], *sink, first_block=first_block)
            window = tuple(take(x, region.new) for x in found)

        linear, state = None, self._joined()
        if spec.lagged:
            k_region = parts["k"].repeat_interleave(mixer.state_heads // mixer.num_kv_heads, dim=1)
            place = region.start[:, None] + torch.arange(k_region.shape[2], device=k.device)
            written = (place < after[:, None]) & (place >= spec.sinks)
            fk = mixer.map_keys(k_region, parts.get("g"))
            fk = fk * keep_rows(written, fk)
            fq = mixer.map_queries(q_region)
            out, states = mixer.linear_branch(
                fq, fk, parts["v"], parts.get("g"), parts.get("beta"), lag=True, state=state
            )
            linear = take(out, region.new)
            gone = (after // spec.window - 1).clamp_min(0) - first_block  # blocks that left the window
            self._keep(states[torch.arange(batch, device=k.device), :, gone])
        elif spec.write != "none":
            fk = mixer.map_keys(k_lin, g)
            fk = fk if valid is None else fk * keep_rows(valid, fk)
            linear, states = mixer.linear_branch(mixer.map_queries(q_lin), fk, v, g, beta, lag=False, state=state)
            self._keep(states[:, :, -1])

        if spec.window:
            self._store_ring(parts, region.start, after)
        self._put("position", after)
        self.cache.count(length if valid is None else None)
        return mixer.combine(window, linear, gate)

    def _region(self, before: torch.Tensor, length: int) -> _Region:
        """The stretch that starts with the block before the current one and ends with the new tokens."""
        window = self.mixer.spec.window
        start = (before // window - 1).clamp_min(0) * window
        held = before - start
        uniform = self.cache.uniform
        most = int(held.max()) if uniform is None else uniform - max(uniform // window - 1, 0) * window
        place = torch.arange(most + length, device=before.device)
        in_ring = place < held[:, None]
        slot = (start[:, None] + place) % (2 * window)
        fresh = (place - held[:, None]).clamp(0, length - 1) + 2 * window
        new = held[:, None] + torch.arange(length, device=before.device)
        return _Region(self.tensors, torch.where(in_ring, slot, fresh), start, new, 2 * window)

    def _store_sinks(self, k: torch.Tensor, v: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Keep tokens at positions below Z."""
        sinks = self.mixer.spec.sinks
        if not sinks or (self.cache.uniform is not None and self.cache.uniform >= sinks):
            return
        place = torch.arange(sinks, device=k.device)
        arrived = (place >= before[:, None]) & (place < after[:, None])
        index = (place - before[:, None]).clamp(0, k.shape[2] - 1)
        for name, x in (("sink_k", k), ("sink_v", v)):
            old = self.tensors[name]
            self._put(name, torch.where(keep_rows(arrived, old), take(x, index).to(old.dtype), old))

    def begin(self, parts: dict[str, torch.Tensor]) -> None:
        """Sinks, ring and position after the first tokens of an empty memory, as many and all real in every row.

        parts: what the ring holds of them, by name, [B, S, T, ...]. The same as `_store_sinks` and `_store_ring` give,
        without their questions to the device.
        """
        spec, tensors, length = self.mixer.spec, self.tensors, parts["k"].shape[2]
        for name in "kv" if spec.sinks else "":
            tensors[f"sink_{name}"][:, :, :length] = parts[name][:, :, : spec.sinks]
        if spec.window:
            first = max(length // spec.window - 1, 0) * spec.window
            slot = first % (2 * spec.window)
            turn = min(first + 2 * spec.window - slot, length)  # from here on in the ring's first slots
            for name, x in parts.items():
                ring = tensors[f"ring_{name}"]
                ring[:, :, slot : slot + turn - first] = x[:, :, first:turn]
                if turn < length:
                    ring[:, :, : length - turn] = x[:, :, turn:]
        tensors["position"].fill_(length)
        self.cache.count(length)

    def _store_ring(self, parts: dict[str, torch.Tensor], start: torch.Tensor, after: torch.Tensor) -> None:
        """Refill the ring from a region that begins at position `start`; slots out of sight become zero."""
        window = self.mixer.spec.window
        slot = torch.arange(2 * window, device=start.device)
        last = after[:, None] - 1
        place = last - (last - slot) % (2 * window)  # the latest position that maps to each slot
        live = (place >= 0) & (place >= (after[:, None] // window - 1) * window)
        index = (place - start[:, None]).clamp_min(0)
        for name, x in parts.items():
            old = self.tensors[f"ring_{name}"]
            index_here = index.clamp_max(x.shape[2] - 1)
            self._put(f"ring_{name}", (take(x, index_here) * keep_rows(live, x)).to(old.dtype))

    # ---------------------------------------------------------------------------------------------------- one token

    def step(self, q, k, v, fq, fk, g, beta, gate) -> torch.Tensor:  # type: ignore[no-untyped-def]
        """Read one token: q [B, H, D], k, v [B, K, D], fq [B, H, F], fk [B, S, F], g, beta [B, S]; out [B, H, 1, D]."""
        mixer, spec, tensors = self.mixer, self.mixer.spec, self.tensors
        position = tensors["position"]
        if spec.sinks:
            self._store_sinks(k.unsqueeze(2), v.unsqueeze(2), position, position + 1)
        window, seen = None, torch.empty(0)
        if spec.window:
            self._put_token(position, k=k, v=v, g=g, beta=beta)
            seen = self._visible(position)
            window = self._read_window(q, seen, position)
        linear = None
        if spec.lagged:
            if g is not None:
                ring_g = tensors["ring_g"]
                past = (ring_g * keep_rows(seen, ring_g)).sum(2).exp()  # from the state's last write to now
                past = past.unsqueeze(-1) if past.ndim == 2 else past
                fq = fq * past.repeat_interleave(mixer.num_heads // mixer.state_heads, dim=1)
        elif spec.write != "none":
            values = v.repeat_interleave(mixer.state_heads // mixer.num_kv_heads, dim=1)
            options = {"log_decay": g, "in_place": not torch.is_grad_enabled()}
            if beta is None:
                self._put("state", step_linear(tensors["state"], fk, values, **options))
            else:
                self._put("state", step_delta(tensors["state"], fk, values, beta, log_decay=g))
            if "z" in tensors:
                one = values.new_ones(*values.shape[:2], 1)
                self._put("z", step_linear(tensors["z"].unsqueeze(-1), fk, one, **options).squeeze(-1))
        if spec.write != "none":
            fq = fq.unflatten(1, (mixer.state_heads, -1))
            linear = torch.einsum("bsrf,bsfv->bsrv", fq, tensors["state"])
            if "z" in tensors:
                linear = torch.cat((linear, torch.einsum("bsrf,bsf->bsr", fq, tensors["z"]).unsqueeze(-1)), dim=-1)
            linear = linear.flatten(1, 2).unsqueeze(2)
        self._put("position", position + 1)
        self.cache.count(1)
        if spec.window:
            self._turn_block()
        expand = tuple(x.unsqueeze(2) for x in window) if window is not None else None
        return mixer.combine(expand, linear, None if gate is None else gate.unsqueeze(2))

    def _put_token(self, position: torch.Tensor, **token: torch.Tensor | None) -> None:
        rows = torch.arange(position.shape[0], device=position.device)
        slot = position % (2 * self.mixer.spec.window)
        for name, x in token.items():
            ring = self.tensors.get(f"ring_{name}")
            if ring is not None and x is not None:
                ring[rows, :, slot] = x.to(ring.dtype)

    def _visible(self, position: torch.Tensor) -> torch.Tensor:
        """Which slots of the ring the token at `position` [B] sees: [B, 2W]."""
        window = self.mixer.spec.window
        slot = torch.arange(2 * window, device=position.device)
        block = (position // window)[:, None]
        own = slot // window == block % 2
        return (own & (slot % window <= position[:, None] % window)) | (~own & (block >= 1))

    def _read_window(self, q: torch.Tensor, seen: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, ...]:
        spec, tensors = self.mixer.spec, self.tensors
        keys, values = tensors["ring_k"].to(q.dtype), tensors["ring_v"].to(q.dtype)
        if spec.sinks:
            block = torch.arange(spec.sinks, device=q.device) // spec.window
            apart = block < (position // spec.window)[:, None] - 1
            keys = torch.cat((keys, tensors["sink_k"].to(q.dtype)), dim=2)
            values = torch.cat((values, tensors["sink_v"].to(q.dtype)), dim=2)
            seen = torch.cat((seen, apart), dim=1)
        grouped = q.unflatten(1, (self.mixer.num_kv_heads, -1))
        return tuple(x.flatten(1, 2) for x in step_window(grouped, keys, values, seen, **self.mixer.scores))

    def _turn_block(self) -> None:
        """Once in W tokens, let go of the block that the next token will not see any more."""
        tensors, window = self.tensors, self.mixer.spec.window
        after, uniform = tensors["position"], self.cache.uniform
        if uniform is not None and (uniform % window or uniform < 2 * window):
            return
        rows = (after % window == 0) & (after >= 2 * window)
        if uniform is None and not bool(rows.any()):
            return
        block = after // window - 2
        if self.mixer.spec.lagged:
            self._write_block(block, rows)
        slot_block = torch.arange(2 * window, device=after.device) // window
        stale = rows[:, None] & (slot_block == (block % 2)[:, None])
        for name in [x for x in tensors if x.startswith("ring_")]:
            tensors[name].masked_fill_(keep_rows(stale, tensors[name]), 0.0)

    def _write_block(self, block: torch.Tensor, rows: torch.Tensor) -> None:
        """Write block number `block` [B] from the ring to the state, in the rows [B] that are due."""
        mixer, spec, tensors, window = self.mixer, self.mixer.spec, self.tensors, self.mixer.spec.window
        offset = torch.arange(window, device=block.device)
        slots = (block % 2)[:, None] * window + offset
        k, v = (take(tensors[name], slots).to(tensors["state"].dtype) for name in ("ring_k", "ring_v"))
        g, beta = (take(tensors[name], slots) if name in tensors else None for name in ("ring_g", "ring_beta"))
        fk = mixer.map_keys(k.repeat_interleave(mixer.state_heads // mixer.num_kv_heads, dim=1), g)
        fk = fk * keep_rows(block[:, None] * window + offset >= spec.sinks, fk)
        no_query = torch.zeros_like(fk).unsqueeze(2)
        state = self._joined()
        _, states = mixer.linear_branch(no_query, fk, v, g, beta, lag=True, state=state)
        self._keep(torch.where(rows[:, None, None, None], states[:, :, -1], state))


class _Region:
    """Ring and new tokens in one row, every row starting at the beginning of a block (position `start` [B])."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], index: torch.Tensor, start: torch.Tensor, new: torch.Tensor, slots: int
    ) -> None:
        self.tensors, self.index, self.start, self.new, self.slots = tensors, index, start, new, slots

    def __call__(self, fresh: torch.Tensor, ring: str | None) -> torch.Tensor:
        """[B, S, L, ...] and the ring named `ring` (None: zeros) -> [B, S, region, ...], float32."""
        if ring is None:
            held = fresh.new_zeros(*fresh.shape[:2], self.slots, *fresh.shape[3:])
        else:
            held = self.tensors[ring].to(fresh.dtype)
        return take(torch.cat((held, fresh), dim=2), self.index)
