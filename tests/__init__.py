"""The tests, in layers: pure, engine, bus, system. `tests.lab` provides guests, buses and
storage."""
