"""The safety matrix: what each way to stop a guest does to the guest's data, on storage of every
kind.

`make bench-safety`, or `python -m tests.safety` after set-up. Rows are cases (tests.safety.cases),
and columns are policies (tests.safety.policies). For each cell, a real QEMU is stopped after its
guest has written records that its disk has acknowledged (tests.safety.cell).
"""
