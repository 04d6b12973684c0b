//! Block devices on a reactor: null, ram, file, and wrappers.
