"""Judge units: which stops of a unit lose data, and which lines prevent that. Pure."""
