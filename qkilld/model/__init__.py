"""Constants and data classes that every other package uses. Imports nothing else of the project."""
