"""The tests, in layers: pure, engine, bus, system. `tests.lab` holds what they stand on."""
