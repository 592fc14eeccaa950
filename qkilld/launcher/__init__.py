"""The launcher of qemu-guest@.service. Entry point: `main.main`."""
