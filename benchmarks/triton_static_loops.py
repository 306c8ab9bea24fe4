"""Machine code as ``cuobjdump -sass`` prints it: instructions, and the loop that does the work."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Instruction = tuple[int, str]


def instructions(text: str) -> list[Instruction]:
    """(address, text) of every instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", text)
    return [(int(address, 16), line.strip()) for address, line in found]


def matrix_loop(code: Sequence[Instruction]) -> list[str]:
    """The innermost loop with the most matrix instructions, or nothing.

    Loops are those of the control flow, not of the addresses: the compiler moves what seldom runs,
    as the wait for a barrier, to the end of the code, and its jump back encloses no loop.
    """
    best: list[str] = []
    for body in _loops(code):
        found = [code[i][1] for i in sorted(body)]
        count, best_count = (sum("MMA" in t for t in each) for each in (found, best))
        if count > best_count or (count and count == best_count and len(found) < len(best)):
            best = found
    return best


def _loops(code: Sequence[Instruction]) -> Iterable[set[int]]:
    """Indices of the instructions of each natural loop."""
    after = _successors(code)
    before: list[list[int]] = [[] for _ in code]
    for i, targets in enumerate(after):
        for target in targets:
            before[target].append(i)
    for end, targets in enumerate(after):
        for start in targets:
            # A way back that the loop's start does not dominate is a jump into its middle.
            if start <= end and end not in _reached(after, 0, without=start):
                yield {start} | _reached(before, end, without=start)


def _successors(code: Sequence[Instruction]) -> list[list[int]]:
    """Where control goes on after each instruction, in this function."""
    index = {address: i for i, (address, _) in enumerate(code)}
    after = []
    for i, (_, text) in enumerate(code):
        predicate, opcode, operands = re.match(r"(@\S+ )?(\S+)(.*)", text).groups()  # type: ignore[union-attr]
        conditional = predicate is not None
        targets = []
        if opcode.split(".")[0] == "BRA":
            targets.append(index[int(operands.split("0x")[-1].split()[0], 16)])
            # Else the condition stands among the operands.
            conditional |= "," in operands
        elif opcode.split(".")[0] not in ("EXIT", "RET"):
            conditional = True
        if conditional and i + 1 < len(code):
            targets.append(i + 1)
        after.append(targets)
    return after


def _reached(edges: Sequence[Sequence[int]], start: int, without: int) -> set[int]:
    """What can be reached from ``start`` on ways that do not touch ``without``."""
    seen: set[int] = set()
    left = [start]
    while left:
        i = left.pop()
        if i != without and i not in seen:
            seen.add(i)
            left.extend(edges[i])
    return seen
