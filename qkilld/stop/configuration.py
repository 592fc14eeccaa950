"""Load qkilld.conf. Imports little, to start fast: see stop.main."""

from __future__ import annotations

from qkilld.adapters import config
from qkilld.model.errors import ConfigError
from qkilld.model.policy import Config
from qkilld.stop.log import say


def configuration() -> Config:
    """Load qkilld.conf. If the file is invalid, use the defaults, because the guest must be stopped
    anyway."""
    try:
        return config.load()
    except ConfigError as error:
        say(f"the configuration is wrong, so the defaults are used:\n{error}")
        return Config()
