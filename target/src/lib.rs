//! The NVMe-oF target: subsystems, controllers, queues, and the daemon.
