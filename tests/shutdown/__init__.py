"""The shutdown matrix: a guest with several disks is stopped, and its records are counted."""
