//! FlexiNS: a software transport with RDMA verbs.
