"""Decodes every entry of the PTX files given, and names opcodes that are not known."""

from __future__ import annotations

import re
import sys

from ptx import sim

known = unknown = 0
for path in sys.argv[1:]:
    with open(path, "rb") as file:
        text = file.read()
    sim.load(text)
    for name in re.findall(rb"\.entry\s+(\w+)\s*\(", text):
        if sim.lib.ptx_check(name):
            unknown += 1
            print(path, sim.lib.ptx_error().decode())
        else:
            known += 1
print(known, "entries decoded,", unknown, "not")
sys.exit(unknown > 0)
