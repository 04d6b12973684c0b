//! The NVMe-oF host: discovery, controllers, queue pairs, and the flexblk command.
