"""The engine: jobs that climb the ladder. It reaches the outside only through `engine.ports`."""
