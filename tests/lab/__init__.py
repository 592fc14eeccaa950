"""The lab: real guests, a private bus and a throwaway container, for tests and the demo.

Every process started here ends with the process that started it, even if that is killed. Everything
written goes to one scratch directory, which is removed with it.
"""
