//! Tests of the codec and of two managers in virtual time.
