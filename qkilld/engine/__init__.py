"""Run the jobs: each climbs the ladder for one process. Everything outside the engine is behind
`engine.ports`."""
