"""Constants and data classes that all other packages use. Imports no other package."""
