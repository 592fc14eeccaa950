"""The campaign: real QEMUs on randomly chosen storage whose behaviour is known.

`make bench-judgement`, or `python -m tests.campaign` after set-up. A run (spec.py) is generated
from a seed (draw.py) or written by hand (cases.py). It consists of real storage (disks.py),
disturbances (noise.py) and standstills of QEMU itself (standstill.py). A real daemon stops QEMU
over D-Bus (run.py). The result is compared with the truth: what is right according to the schedule
(truth.py, judge.py).
"""
