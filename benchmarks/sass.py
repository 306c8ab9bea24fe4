"""Reads what ptxas and cuobjdump say of a kernel: resources, instructions, loops, the way through.

A function body is a list of (address, instruction), as ``functions`` gives it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path


def _tool(name: str) -> str:
    found = shutil.which(name)
    if found is not None:
        return found
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def resources(report: str) -> dict[str, tuple[int, int, int]]:
    """Registers, spilled bytes and stack bytes of each mangled kernel name."""
    out: dict[str, tuple[int, int, int]] = {}
    name, stack, spills = "", 0, 0
    for line in report.splitlines():
        if match := re.search(r"Compiling entry function '(\S+)'", line):
            name = match[1]
        elif match := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+)", line):
            stack, spills = int(match[1]), int(match[2]) + int(match[3])
        elif match := re.search(r"Used (\d+) registers", line):
            out[name] = (int(match[1]), spills, stack)
    return out


def functions(path: Path, arch: str, select: str) -> dict[str, list[tuple[int, str]]]:
    """(address, instruction) of every kernel whose mangled name matches ``select``."""
    command = [_tool("cuobjdump"), "-sass", "-arch", f"sm_{arch}", str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    out: dict[str, list[tuple[int, str]]] = {}
    current: list[tuple[int, str]] | None = None
    assert process.stdout is not None
    for line in process.stdout:
        if match := re.match(r"\s+Function : (\S+)", line):
            wanted = re.search(select, match[1])
            current = out.setdefault(match[1], []) if wanted else None
        elif current is not None and (m := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line)):
            current.append((int(m[1], 16), m[2]))
    process.wait()
    return out


def demangle(names: list[str]) -> list[str]:
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True)
    return text.stdout.splitlines()


def opcode(instruction: str) -> str:
    """``LDG.E.128`` of ``@!P0 LDG.E.128 R4, [R2]``."""
    return re.sub(r"^@!?U?P\w+\s+", "", instruction).split()[0]


def main_loop(body: list[tuple[int, str]], marker: str) -> list[str]:
    """The innermost loop that holds most ``marker`` instructions."""
    loops = []
    for address, text in body:
        target = re.search(r"\bBRA\S*\s+.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < address:
            start = int(target[1], 16)
            loops.append([t for a, t in body if start <= a <= address])
    counts = [(sum(opcode(t).startswith(marker) for t in loop), -len(loop)) for loop in loops]
    inner = [c for c in counts if c[0]]
    if not inner:
        return [text for _, text in body]
    # An outer loop holds the inner one's markers and its own; take the shortest of the larger half.
    most = max(c[0] for c in inner)
    best = max((c for c in inner if 3 * c[0] >= most), key=lambda c: c[1])
    return loops[counts.index(best)]


def outer_loop(body: list[tuple[int, str]]) -> int:
    """The index of the first instruction of the longest loop."""
    index = {address: i for i, (address, _) in enumerate(body)}
    starts = []
    for i, (_, text) in enumerate(body):
        target = re.search(r"\bBRA\S*\s+.*?0x([0-9a-f]+)", text)
        if target and index[int(target[1], 16)] < i:
            starts.append((i - index[int(target[1], 16)], index[int(target[1], 16)]))
    return max(starts)[1]


def hot_path(
    body: list[tuple[int, str]],
    entry: int = 0,
    load: str = r"LDG\.E.*128",
    store: str = r"STG\.E$",
) -> list[str]:
    """The shortest way through a kernel without main loop that loads and stores.

    ``load`` and ``store`` match the instructions, by default a load of 16 bytes and a store of
    four. Of all stores the one farthest away counts. The way leaves out what most warps skip:
    filling a table, unaligned inputs, short last blocks; and what comes before instruction
    ``entry``.
    """
    index = {address: i for i, (address, _) in enumerate(body)}

    def following(i: int) -> list[int]:
        text = body[i][1]
        always = not text.startswith("@")
        if opcode(text).startswith("EXIT"):
            return [] if always else [i + 1]
        out = [] if opcode(text).startswith("BRA") and always else [i + 1]
        # A call on a condition is a jump to code that was moved out of the way.
        if opcode(text).startswith("BRA") or (opcode(text).startswith("CALL") and not always):
            out.append(index[int(re.findall(r"0x([0-9a-f]+)", text)[-1], 16)])
        return [j for j in out if j < len(body)]

    def ways(start: int) -> dict[int, int]:
        previous, queue = {start: -1}, [start]
        for i in queue:
            for j in following(i):
                if j not in previous:
                    previous[j] = i
                    queue.append(j)
        return previous

    def walk(previous: dict[int, int], end: int) -> list[int]:
        out = []
        while end >= 0:
            out.append(end)
            end = previous[end]
        return out[::-1]

    def places(pattern: str) -> list[int]:
        return [i for i, (_, text) in enumerate(body) if re.match(pattern, opcode(text))]

    from_entry = ways(entry)
    best: list[int] = []
    for last in places(store):
        candidates = []
        for first in (i for i in places(load) if i in from_entry):
            after = ways(first)
            if last in after:
                candidates.append([*walk(from_entry, first), *walk(after, last)[1:]])
        if candidates:
            best = max(best, min(candidates, key=len), key=len)
    after = ways(best[-1])
    end = min((i for i in places("EXIT") if i in after), key=lambda i: len(walk(after, i)))
    return [body[i][1] for i in (*best, *walk(after, end)[1:])]
