"""Judgement: from what is known to what is to be done. Pure: no clock, no I/O, no state."""
