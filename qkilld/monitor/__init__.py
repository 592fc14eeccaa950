"""QEMU's monitor and the guest agent: finding them, proving whose they are, and talking to them."""
