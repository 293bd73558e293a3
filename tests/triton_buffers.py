"""Whether a pipelined loop of Triton's code for Hopper refills a buffer that a product may still be reading.

Products (warp_group_dot) are asynchronous and end in order; warp_group_dot_wait leaves `pendings` of them running. A
loop of `num_stages` copies tiles of later iterations into n buffers in turn: into the one that this iteration has read
where n is 1, else into the one of the iteration before. Triton 3.6 and 3.7 give some tiles one buffer and sums that no
other operation of the loop reads no wait, and so add up whatever the buffer holds.
"""

import re
from typing import NamedTuple

VIEWS = ("ttg.memdesc_index", "ttg.memdesc_trans", "ttg.memdesc_subslice", "ttg.memdesc_reinterpret")
VALUE = r"%[\w]+(?:#\d+)?"


class Event(NamedTuple):
    """kind: "dot" with the buffers that it reads, "copy" with the one that it fills, "wait" with `pendings`."""

    kind: str
    buffers: tuple[str, ...] = ()
    pendings: int = 0


def refilled(ttgir: str) -> set[str]:
    """Names of the buffers that are filled while a product that reads them may run."""
    sizes = {name: int(count) for name, count in
             re.findall(rf"({VALUE}) = ttg\.local_alloc[^\n]*memdesc<(\d+)x\d+x\d+x[^\n]*mutable", ttgir)}
    found: set[str] = set()
    for events in _loops(ttgir):
        running: list[tuple[int, Event]] = []
        for turn in range(3):
            for event in events:
                if event.kind == "dot":
                    running.append((turn, event))
                elif event.kind == "wait":
                    running = running[len(running) - event.pendings:] if event.pendings else []
                else:
                    name = event.buffers[0]
                    last = turn if sizes.get(name, 1) == 1 else turn - 1
                    if any(since <= last and name in dot.buffers for since, dot in running):
                        found.add(name)
    return found


def _loops(ttgir: str) -> list[list[Event]]:
    """The events of each innermost loop, in order."""
    view_of: dict[str, str] = {}
    loops: list[list[Event]] = []
    open_loops: list[tuple[int, list[Event]]] = []

    def base(name: str) -> str:
        while name in view_of:
            name = view_of[name]
        return name

    for line in ttgir.splitlines():
        indent = len(line) - len(line.lstrip())
        while open_loops and line.strip().startswith("}") and indent <= open_loops[-1][0]:
            loops.append(open_loops.pop()[1])
        if "scf.for " in line:
            open_loops.append((indent, []))
            continue
        made = re.match(rf"\s*(?:({VALUE})(?::\d+)? = )?(tt\w*\.\w+) (.*)", line)
        if made is None:
            continue
        name, operation, rest = made.groups()
        values = re.findall(VALUE, rest)
        if operation in VIEWS:
            view_of[name] = values[0]
        if not open_loops:
            continue
        events = open_loops[-1][1]
        if operation == "ttng.warp_group_dot":
            events.append(Event("dot", tuple(map(base, values[:2]))))
        elif operation == "ttng.warp_group_dot_wait":
            pendings = re.search(r"pendings = (\d+)", rest)
            events.append(Event("wait", pendings=int(pendings.group(1)) if pendings else 0))
        elif operation == "ttg.async_copy_global_to_local":
            events.append(Event("copy", (base(values[1]),)))
    return loops
