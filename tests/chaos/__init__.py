"""Stops while everything around them fails: `make chaos`, or `python -m tests.chaos`.

stand_in.c     a program that passes for a QEMU and notes each signal that reaches it
plan           which guests there are, who stops them when and how, and what fails meanwhile
agent          a program inside a throwaway system: starts the guests, is the client of every job
run            boots that system, starts the agent, and has things fail
rules          what must hold of each guest afterwards
late           how late signals, answers and entries are while journald does not read
test_*         a short run, and the rules
"""
