"""D-Bus: the only package that imports dbus_next."""
