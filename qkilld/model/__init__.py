"""Constants and data classes that all other packages use. Imports none of them."""
