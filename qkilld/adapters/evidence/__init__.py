"""What can be seen of a process from outside: a reader for each source.

    process     /proc/PID: state, signals, tracer, CPU time, I/O counters
    threads     where its threads stand, how often they were woken
    rings       requests in flight on io_uring; whether there may be some of Linux AIO
    cgroup      writeback, writes and the freezer of its control groups, v1 and v2
    host        writeback of the whole host

Each returns None for what it cannot read and never raises for a target that goes away. All are
synchronous and for one thread at a time; the sampler runs them in threads of their own.
"""
