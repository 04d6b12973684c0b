//! Where the fields that an engine needs lie in each supported fio release, and how a running fio is recognised.
//!
//! fio has no stable plugin interface: an engine reads and writes fio's own structures, and their layout moves between
//! releases. Each release is one row here, chosen by the version string and proven before a field is used:
//! the end of `thread_options` (from the option table that fio exports), the magic in it, and the self-linked list
//! head in a fresh `io_u`. A fio that misses any of these is refused with one line.

/// Offsets in bytes that are the same in every release from 3.28 to 3.42.
pub(crate) mod fixed {
    /// `thread_data.o` (`struct thread_options`).
    pub(crate) const OPTIONS: usize = 24;
    /// `thread_options.magic`, relative to `thread_data`.
    pub(crate) const OPT_MAGIC: usize = 24;
    /// What stands there.
    pub(crate) const OPT_MAGIC_VALUE: u32 = 0x4f50_544e;
    /// `thread_options.iodepth`, relative to `thread_data`.
    pub(crate) const IODEPTH: usize = 208;
    /// `io_u.start_time` (`struct timespec`).
    pub(crate) const START_TIME: usize = 0;
    /// `io_u.issue_time`.
    pub(crate) const ISSUE_TIME: usize = 16;
    /// `io_u.file`.
    pub(crate) const FILE: usize = 32;
    /// `io_u.flags`.
    pub(crate) const FLAGS: usize = 40;
    /// `IO_U_F_FREE`, the only flag of a fresh `io_u`.
    pub(crate) const FLAG_FREE: u32 = 1;
    /// `io_u.ddir`.
    pub(crate) const DDIR: usize = 44;
    /// `fio_file.filetype`.
    pub(crate) const FILETYPE: usize = 16;
    /// `FIO_TYPE_BLOCK`.
    pub(crate) const FILETYPE_BLOCK: i32 = 2;
    /// `fio_file.fileno`.
    pub(crate) const FILENO: usize = 36;
    /// `fio_file.file_name`.
    pub(crate) const FILE_NAME: usize = 40;
    /// `fio_file.real_file_size`.
    pub(crate) const REAL_FILE_SIZE: usize = 48;
    /// Size of one `fio_option`.
    pub(crate) const OPTION_SIZE: usize = 1512;
    /// `fio_option.type`.
    pub(crate) const OPTION_TYPE: usize = 24;
    /// `fio_option.off1`; `off2` to `off6` follow it.
    pub(crate) const OPTION_OFF1: usize = 28;
}

/// Offsets in `struct io_u` that move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct IoUnit {
    pub(crate) offset: usize,
    pub(crate) xfer_buf: usize,
    pub(crate) xfer_buflen: usize,
    pub(crate) error: usize,
    /// A list head that fio links to itself just before `io_u_init`.
    pub(crate) verify_list: usize,
}

/// Offsets in `struct ioengine_ops` that move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Operations {
    pub(crate) cleanup: usize,
    pub(crate) open_file: usize,
    pub(crate) close_file: usize,
    pub(crate) invalidate: usize,
    pub(crate) get_file_size: usize,
    pub(crate) iomem_alloc: usize,
    pub(crate) iomem_free: usize,
    pub(crate) io_u_init: usize,
    pub(crate) option_struct_size: usize,
    pub(crate) options: usize,
    pub(crate) size: usize,
}

/// One fio release.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// `fio --version` prints this.
    pub(crate) version: &'static str,
    /// `FIO_IOOPS_VERSION`.
    pub(crate) ioops: i32,
    /// `thread_data.eo`: the engine's own options.
    pub(crate) engine_options: usize,
    /// `thread_data.orig_buffer`; `orig_buffer_size` follows it.
    pub(crate) orig_buffer: usize,
    pub(crate) io_u: IoUnit,
    pub(crate) ops: Operations,
    pub(crate) flags: Flags,
}

/// Bits of `enum fio_ioengine_flags` that move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Flags {
    /// `FIO_NO_OFFLOAD`.
    pub(crate) no_offload: i32,
    /// `FIO_ASYNCIO_SETS_ISSUE_TIME`; zero: not there yet.
    pub(crate) sets_issue_time: i32,
}

const FLAGS_3_28: Flags = Flags {
    no_offload: 1 << 15,
    sets_issue_time: 0,
};
const FLAGS_3_31: Flags = Flags {
    no_offload: 1 << 15,
    sets_issue_time: 1 << 16,
};
const FLAGS_3_42: Flags = Flags {
    no_offload: 1 << 16,
    sets_issue_time: 1 << 17,
};

const fn io_u(shift: usize, verify_list: usize) -> IoUnit {
    IoUnit {
        offset: 64 + shift,
        xfer_buf: 96 + shift,
        xfer_buflen: 104 + shift,
        error: 136 + shift,
        verify_list,
    }
}

const IO_U_3_28: IoUnit = io_u(0, 152);
const IO_U_3_30: IoUnit = io_u(8, 160);
const IO_U_3_41: IoUnit = io_u(16, 176);

const fn operations(base: usize, option_struct_size: usize) -> Operations {
    Operations {
        cleanup: base,
        open_file: base + 8,
        close_file: base + 16,
        invalidate: base + 24,
        get_file_size: base + 40,
        iomem_alloc: base + 64,
        iomem_free: base + 72,
        io_u_init: base + 80,
        option_struct_size,
        options: option_struct_size + 8,
        size: option_struct_size + 16,
    }
}

const OPS_3_28: Operations = operations(120, 248);
const OPS_3_34: Operations = operations(120, 264);
const OPS_3_36: Operations = operations(120, 272);
const OPS_3_40: Operations = operations(120, 280);
const OPS_3_41: Operations = operations(112, 272);

const fn release(
    version: &'static str,
    ioops: i32,
    engine_options: usize,
    orig_buffer: usize,
    io_u: IoUnit,
    ops: Operations,
    flags: Flags,
) -> Layout {
    Layout {
        version,
        ioops,
        engine_options,
        orig_buffer,
        io_u,
        ops,
        flags,
    }
}

/// Every supported release, measured with `offsetof` against its sources.
#[rustfmt::skip]
pub(crate) static RELEASES: [Layout; 15] = [
    release("fio-3.28", 30, 4208, 278_424, IO_U_3_28, OPS_3_28, FLAGS_3_28),
    release("fio-3.29", 30, 4208, 278_424, IO_U_3_28, OPS_3_28, FLAGS_3_28),
    release("fio-3.30", 31, 4216, 189_056, IO_U_3_30, OPS_3_28, FLAGS_3_28),
    release("fio-3.31", 31, 4216, 189_056, IO_U_3_30, OPS_3_28, FLAGS_3_31),
    release("fio-3.32", 31, 4216, 189_056, IO_U_3_30, OPS_3_28, FLAGS_3_31),
    release("fio-3.33", 31, 4216, 189_056, IO_U_3_30, OPS_3_28, FLAGS_3_31),
    release("fio-3.34", 32, 3280, 188_120, IO_U_3_30, OPS_3_34, FLAGS_3_31),
    release("fio-3.35", 32, 3280, 188_120, IO_U_3_30, OPS_3_34, FLAGS_3_31),
    release("fio-3.36", 33, 3304, 188_152, IO_U_3_30, OPS_3_36, FLAGS_3_31),
    release("fio-3.37", 33, 3304, 188_152, IO_U_3_30, OPS_3_36, FLAGS_3_31),
    release("fio-3.38", 36, 3520, 188_368, IO_U_3_30, OPS_3_36, FLAGS_3_31),
    release("fio-3.39", 36, 3520, 188_368, IO_U_3_30, OPS_3_36, FLAGS_3_31),
    release("fio-3.40", 37, 3528, 188_376, IO_U_3_30, OPS_3_40, FLAGS_3_31),
    release("fio-3.41", 39, 3560, 188_408, IO_U_3_41, OPS_3_41, FLAGS_3_31),
    release("fio-3.42", 39, 3584, 188_456, IO_U_3_41, OPS_3_41, FLAGS_3_42),
];

/// Why a fio is refused. The text is all that its user sees.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The symbols that every fio exports are not there.
    #[error(
        "the program that loaded this engine does not export {0}: it is not fio, or a fio before 3.28"
    )]
    NotFio(&'static str),
    /// The version string is not in the table.
    #[error(
        "{0} is not supported; use one of fio 3.28 to 3.42, as released (its plugin interface differs in every release)"
    )]
    Version(String),
    /// The version string is in the table, the structures are others.
    #[error(
        "this {version} is not as released ({what}); use an unchanged fio 3.28 to 3.42, for instance your distribution's"
    )]
    Changed {
        /// The version it claims.
        version: &'static str,
        /// What gave it away.
        what: &'static str,
    },
}

/// The row of a fio whose version string is `version`.
pub(crate) fn select(version: &str) -> Result<&'static Layout, Refusal> {
    RELEASES
        .iter()
        .find(|row| row.version == version)
        .ok_or_else(|| Refusal::Version(version.to_owned()))
}

impl Layout {
    /// Compares the end of `thread_options` (the largest `off1` of fio's own options) with this row.
    pub(crate) fn prove_options(&self, max_off1: u32) -> Result<(), Refusal> {
        // `eo` is the first word behind `thread_options`, whose last option field is a 4-byte one.
        let end = fixed::OPTIONS + (max_off1 as usize + 4).next_multiple_of(8);
        if end == self.engine_options {
            Ok(())
        } else {
            Err(self.changed("its option table ends elsewhere"))
        }
    }

    /// The refusal of a fio that claims to be this release and is not.
    pub(crate) fn changed(&self, what: &'static str) -> Refusal {
        Refusal::Changed {
            version: self.version,
            what,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The largest `off1` of each release, read from the binaries.
    const MAX_OFF1: [u32; 15] = [
        4176, 4180, 4188, 4188, 4188, 4188, 3252, 3252, 3272, 3272, 3488, 3488, 3496, 3528, 3552,
    ];

    #[test]
    fn every_release_is_chosen_and_proven() {
        for (row, max_off1) in RELEASES.iter().zip(MAX_OFF1) {
            let chosen = select(row.version).expect("in the table");
            assert_eq!(chosen, row);
            assert_eq!(chosen.prove_options(max_off1), Ok(()), "{}", row.version);
        }
    }

    #[test]
    fn an_unknown_fio_is_refused_by_name() {
        for version in [
            "fio-3.27",
            "fio-3.43",
            "fio-3.50",
            "fio-3.39-12-g0123456",
            "",
            "fio-3.3",
        ] {
            let refusal = select(version).expect_err("not in the table");
            assert!(refusal.to_string().starts_with(&format!(
                "{version} is not supported; use one of fio 3.28 to 3.42"
            )));
        }
    }

    #[test]
    fn a_changed_fio_is_refused_although_its_name_is_known() {
        let row = select("fio-3.33").expect("in the table");
        for max_off1 in [0, 4188 - 8, 4188 + 8, 3488] {
            let refusal = row.prove_options(max_off1).expect_err("another layout");
            assert!(
                refusal
                    .to_string()
                    .starts_with("this fio-3.33 is not as released")
            );
        }
    }

    #[test]
    fn rows_of_one_interface_version_differ_where_they_must() {
        // Same FIO_IOOPS_VERSION, other structures: fio's own check cannot tell these apart, ours does.
        let (a, b) = (
            select("fio-3.41").expect("row"),
            select("fio-3.42").expect("row"),
        );
        assert_eq!(a.ioops, b.ioops);
        assert_ne!(a.engine_options, b.engine_options);
        assert!(b.prove_options(3528).is_err());
    }

    #[test]
    fn offsets_of_3_33_and_3_42_are_the_measured_ones() {
        let row = select("fio-3.33").expect("row");
        assert_eq!(
            row.io_u,
            IoUnit {
                offset: 72,
                xfer_buf: 104,
                xfer_buflen: 112,
                error: 144,
                verify_list: 160
            }
        );
        assert_eq!(
            (
                row.ops.cleanup,
                row.ops.iomem_alloc,
                row.ops.options,
                row.ops.size
            ),
            (120, 184, 256, 264)
        );
        let row = select("fio-3.42").expect("row");
        assert_eq!(
            row.io_u,
            IoUnit {
                offset: 80,
                xfer_buf: 112,
                xfer_buflen: 120,
                error: 152,
                verify_list: 176
            }
        );
        assert_eq!(
            (
                row.ops.cleanup,
                row.ops.iomem_alloc,
                row.ops.options,
                row.ops.size
            ),
            (112, 176, 280, 288)
        );
    }
}
