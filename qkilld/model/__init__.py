"""Constants and data classes that every other package uses. Imports no other package of the
project."""
