"""D-Bus: the only package that imports a D-Bus library."""
