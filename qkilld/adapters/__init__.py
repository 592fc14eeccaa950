"""Adapters: /proc and pidfds, the journal, configuration files, the clock."""
