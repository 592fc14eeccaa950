"""Stops while everything around them fails: `make chaos`, or `python -m tests.chaos`.

stand_in.c     a program that qkilld takes for QEMU; it records the signals that it gets
plan           the guests, the calls that stop them, and the failures meanwhile
agent          a program inside a throwaway system that starts the guests and requests every job
run            boots that system, starts the agent, and causes the failures
rules          what must be true for each guest afterwards
late           how late signals, replies and journal entries are while journald does not read
test_*         a short run, and tests of the rules
"""
