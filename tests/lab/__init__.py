"""The lab: real guests, a private bus and a throwaway container, for the tests and the demo.

Everything that is started here goes with the process that started it, also when that is killed;
everything that is written goes to one scratch directory, which goes with it too.
"""
