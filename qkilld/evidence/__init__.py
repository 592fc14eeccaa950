"""Read what can be observed of a process from outside. There is one reader for each source.

    process_reader  /proc/PID: state, signals, tracer, CPU time, I/O counters
    threads         where its threads wait, and how often they were woken
    rings           requests in flight on io_uring; whether Linux AIO may have any in flight
    storage         the disks and network mounts under its images
    sockets, peers  its connections, and the servers at their other ends
    cgroup          writeback, writes and the freezer of its control groups, v1 and v2
    meminfo         writeback of the whole host

Readers return None for unreadable values, and raise no exception if the process exits. Readers may
block, and most are not thread-safe, so the sampler runs them in its own threads.
"""
