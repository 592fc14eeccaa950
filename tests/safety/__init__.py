"""The safety matrix: what each way to stop a guest does to it, on storage of every kind.

`make bench-safety`, or `python -m tests.safety` after set-up. Rows are cases
(tests.safety.cases), columns policies (tests.safety.policies); a cell is one real QEMU, whose guest
wrote records that its disk acknowledged, stopped for real (tests.safety.cell).
"""
