//! NVMe base, NVM command set and Fabrics structures, without I/O.
