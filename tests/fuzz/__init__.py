"""Hostile input: `make fuzz`, or `python -m tests.fuzz` after set-up.

messages     makes D-Bus messages, valid and broken, from a seed
hostile      a program that sends these messages over several connections
flood        runs this program against a daemon, and measures a well-behaved client beside it
test_*       a short flood, and tests of every parser of untrusted text with Hypothesis
"""
