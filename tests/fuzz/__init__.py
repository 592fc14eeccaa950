"""Hostile input: `make fuzz`, or `python -m tests.fuzz` after set-up.

messages     makes D-Bus messages, valid and broken, from a seed
hostile      a program that sends them over several connections
flood        runs it against a daemon, with a well-behaved client beside it, and measures
test_*       a short run of it, and every parser of untrusted text with Hypothesis
"""
