//! The machine put together: configuration, board wiring, vCPU threads, lifecycle, control socket.
