"""Other releases of Debian: the package in clean systems, and the suite in them."""
