"""Two faults of compilers that make kernels silently wrong on Hopper, found in what they wrote.

Both were met on an H200: every result is of the right size and some are wrong. Neither shows in the interpreter.
"""

from __future__ import annotations

import re
from collections import deque

NO_RESULT = re.compile(
    r"^(ST|BAR|BRA|EXIT|RET|MEMBAR|FENCE|WARP|DEPBAR|RED|CCTL|NOP|BSSY|BSYNC|SYNCS|ARRIVES|LDGSTS|UTMA|CALL|ERRBAR"
    r"|LDGDEPBAR|NANOSLEEP|YIELD|BPT|ACQ|UBLK|PREEXIT|BREAK|BMOV)"
)
"""Instructions whose first operand is not written."""
FROM_REGISTERS = re.compile(r"HGMMA\.64x(\d+)x\S* R\d+, R(\d+)(?:\.reuse)?, gdesc")
"""A product of a warp group whose left factor lies in registers: four for each of its threads."""


def overwritten(sass: str) -> list[str]:
    """Products that read, on a later turn of a loop, registers that something else in the loop has written.

    ptxas before 13.4 may take a left factor that is made before a loop for dead after its first use in it. A factor
    that the loop itself makes has its writer between the start of the loop and the product, and is not reported.

    Args:
        sass: of one kernel, as `nvdisasm -c` prints it, with labels.
    """
    lines, labels = _instructions(sass)
    wanted = {
        at: [int(found.group(2)) + i for i in range(4)]
        for at, text in enumerate(lines)
        if (found := FROM_REGISTERS.match(text))
    }
    watched = sorted({register for registers in wanted.values() for register in registers})
    slots = {register: slot for slot, register in enumerate(watched)}
    writers = _reaching(lines, labels, slots)
    found = []
    for at, registers in wanted.items():
        for register in registers:
            known = writers[at][slots[register]] if writers[at] is not None else ()
            if any(x < at for x in known) and any(x > at for x in known):
                later = next(lines[x] for x in sorted(known) if x > at)
                found.append(f"{lines[at][:60]} reads R{register}, which {later[:40]} has overwritten")
                break
    return found


def refilled(ttgir: str) -> list[str]:
    """Buffers of one slot that the copy for the next turn fills while tensor cores may still read them.

    Triton 3.6 gives a tile that both a product and something else read one slot in its pipeline, and lets products of
    a turn end in the next.

    Args:
        ttgir: Triton's representation of one kernel before LLVM's.
    """
    late = any(int(x) > 0 for x in re.findall(r"warp_group_dot_wait .*pendings = (\d+)", ttgir))
    if not late:
        return []
    lines, found = ttgir.splitlines(), []
    for buffer in re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<1x", ttgir):
        views = {buffer}
        for made, source in re.findall(r"(%\w+) = ttg\.memdesc_\w+ (%\w+)", ttgir):
            if source in views:
                views.add(made)
        named = re.compile("|".join(rf"{re.escape(view)}\b" for view in sorted(views - {buffer})) or r"(?!)")
        used = [line for line in lines if named.search(line)]
        if any("warp_group_dot %" in line for line in used) and any("async_copy" in line for line in used):
            found.append(f"the one slot of {buffer} is refilled while a product may read it")
    return found


def _instructions(sass: str) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and the index that each label stands for."""
    lines: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(lines)
        elif code := re.match(r"\s+/\*[0-9a-f]{4,5}\*/\s+(.*?)\s*;", line):
            lines.append(code.group(1))
    return lines, labels


def _written(text: str) -> tuple[list[int], bool]:
    """Registers R that an instruction writes, and whether it does so only under a predicate."""
    guarded = re.match(r"@!?U?P\w+ ", text)
    text = text[guarded.end() :] if guarded else text
    name, _, rest = text.partition(" ")
    if NO_RESULT.match(name):
        return [], bool(guarded)
    targets = re.match(r"(?:U?P(?:T|\d), )*R(\d+)\b", rest)
    if targets is None:
        return [], bool(guarded)
    return [int(targets.group(1)) + i for i in range(_width(name))], bool(guarded)


def _width(name: str) -> int:
    """How many registers an instruction writes."""
    if product := re.match(r"HGMMA\.64x(\d+)x", name):
        return int(product.group(1)) // 2
    if name.startswith("LDSM"):
        return {"4": 4, "2": 2}.get(name.rpartition(".")[2], 1)
    if name.startswith(("HMMA", "IMMA")) or (name.startswith(("LD", "ATOM")) and ".128" in name):
        return 4
    return 2 if ".64" in name or "WIDE" in name or (name.startswith("CS2R") and ".32" not in name) else 1


def _reaching(
    lines: list[str], labels: dict[str, int], slots: dict[int, int]
) -> list[tuple[frozenset[int], ...] | None]:
    """Before each instruction, who may have written each watched register last; None where it is never reached."""
    written = [_written(text) for text in lines]
    before: list[tuple[frozenset[int], ...] | None] = [None] * len(lines)
    before[:1] = [tuple(frozenset() for _ in slots)][: len(lines)]
    work = deque([0] if lines else [])
    while work:
        at = work.popleft()
        state = list(before[at] or ())
        registers, guarded = written[at]
        for register in registers:
            if register in slots:
                old = state[slots[register]] if guarded else frozenset()
                state[slots[register]] = old | {at}
        for target in _next(at, lines, labels):
            known = before[target]
            merged = tuple(state) if known is None else tuple(a | b for a, b in zip(known, state))
            if merged != known:
                before[target] = merged
                work.append(target)
    return before


def _next(at: int, lines: list[str], labels: dict[str, int]) -> list[int]:
    """Where the instruction may go on."""
    text, found = lines[at], []
    guarded = text.startswith("@")
    name = re.sub(r"^@!?U?P\w+ ", "", text).partition(" ")[0]
    label = re.search(r"\.L_x_\d+", text)
    if name.startswith(("BRA", "CALL")) and label and label.group(0) in labels:
        found.append(labels[label.group(0)])
    ends = name.startswith(("BRA", "EXIT", "RET")) and not guarded and not re.search(r"\bU?P\d, ", text)
    if not ends:
        found.append(at + 1)
    return [target for target in found if target < len(lines)]
