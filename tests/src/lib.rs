//! End-to-end, interoperability, fault and soak tests.
