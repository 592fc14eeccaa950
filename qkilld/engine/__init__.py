"""The engine: jobs that climb the ladder. Touches the outside through `engine.ports` alone."""
