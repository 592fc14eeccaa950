"""The tests, in layers: pure, engine, bus, system. `tests.lab` has the guests, buses and storage
for them."""
