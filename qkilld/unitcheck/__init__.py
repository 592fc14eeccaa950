"""Judge units: which stops of a unit lose data, and the lines that prevent it. Pure."""
