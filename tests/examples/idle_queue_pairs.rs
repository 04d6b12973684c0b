//! Opens a number of I/O queue pairs and keeps them idle until standard input ends: for measuring memory.
fn main() {}
