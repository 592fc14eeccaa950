"""Access to the system: /proc and pidfds, the journal, configuration files, the clock."""
