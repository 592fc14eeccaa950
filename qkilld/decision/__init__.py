"""Decisions, from evidence to the next step. Pure: no clock, no I/O, no state."""
