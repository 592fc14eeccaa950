"""The lab: real guests, a private bus and a throwaway container, for tests and the demo.

A process started here ends at the latest when the process that started it ends or is killed. All
files are in one scratch directory, which is removed, too.
"""
