"""Formats of the frozen base behind one FrozenLinear protocol."""
