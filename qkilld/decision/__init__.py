"""Decide the next step of a job from the evidence. Pure: no clock, no I/O, no state."""
