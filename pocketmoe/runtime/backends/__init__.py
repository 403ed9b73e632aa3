"""How one expert is held and computed: slots, or sessions.

choice.py         which backend runs here: slots where they can be had, else sessions, and why
cpu.py            the processor, as far as it decides the kernels and so the bits
graph_checks.py   what a bundle's graphs may hold, and that they take and give what the manifest says: read off the
onnx_wire.py      saved models read and changed without the onnx package: where initializers are, accuracy levels
pack.py           experts packed for this machine, beside the published ones or in their place
pack_in_place.py  moves experts from how they were published to how they are packed, and back
packer.py         packs experts of one kind, one at a time
packing.py        packs experts for this CPU once, and keeps them beside the bundle
probe.py          the slot self-test without a bundle
protocol.py       the small protocol: a backend makes slots, a slot loads and runs one expert
sessions.py       the backend of public API only: a session per expert
slots.py          the fast backend: packed weights in one file in memory, mapped, rewritten in place, self-tested
"""
