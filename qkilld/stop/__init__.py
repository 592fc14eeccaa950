"""qkilld-stop, the helper for ExecStop=. Entry point: `main.main`."""
