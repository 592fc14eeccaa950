"""Read what can be observed of a process from outside; one reader for each source.

    process     /proc/PID: state, signals, tracer, CPU time, I/O counters
    threads     where its threads wait, and how often they were woken
    rings       requests in flight on io_uring; whether Linux AIO may have some
    cgroup      writeback, writes and the freezer of its control groups, v1 and v2
    host        writeback of the whole host

Each returns None for unreadable values and never raises if the target exits. All block, and
none is thread-safe; the sampler runs them in its own threads.
"""
