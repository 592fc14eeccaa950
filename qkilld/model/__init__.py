"""Words and data: what every other part speaks in. Imports nothing of the project but itself."""
