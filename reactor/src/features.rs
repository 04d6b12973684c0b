//! What this kernel's io_uring can do: probed once per ring, used at run time.

use io_uring::{IoUring, Probe, opcode};

/// Optional abilities of the kernel. Everything works without them, some of it slower; what cannot
/// (multishot receives) is refused by the caller who needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Features {
    /// `IORING_SETUP_SINGLE_ISSUER` (Linux 6.0): no locking of the submission side.
    pub single_issuer: bool,
    /// `IORING_SETUP_DEFER_TASKRUN` (6.1): completions are made when we enter, not by interrupting
    /// us, and a flag in shared memory says when there are some to make.
    pub defer_taskrun: bool,
    /// `IORING_SETUP_COOP_TASKRUN` (5.19): no inter-processor interrupt per completion.
    pub coop_taskrun: bool,
    /// `IORING_FEAT_EXT_ARG` (5.11): a time-out travels with the wait; before, we `ppoll` the ring.
    pub ext_arg: bool,
    /// Provided-buffer rings (5.19).
    pub buffer_rings: bool,
    /// Multishot `recvmsg` (6.0).
    pub recv_multishot: bool,
    /// `SENDMSG_ZC` (6.1) with the report whether the kernel copied after all (6.2). Neither the
    /// report nor its absence can be probed, so this says whether the kernel is 6.7 or newer.
    pub send_zc: bool,
    /// A sparse table of registered buffers (5.19).
    pub fixed_buffers: bool,
}

impl Features {
    /// Everything.
    pub const ALL: Self = Self {
        single_issuer: true,
        defer_taskrun: true,
        coop_taskrun: true,
        ext_arg: true,
        buffer_rings: true,
        recv_multishot: true,
        send_zc: true,
        fixed_buffers: true,
    };

    /// Nothing optional: io_uring as in Linux 5.6.
    pub const NONE: Self = Self {
        single_issuer: false,
        defer_taskrun: false,
        coop_taskrun: false,
        ext_arg: false,
        buffer_rings: false,
        recv_multishot: false,
        send_zc: false,
        fixed_buffers: false,
    };

    /// Makes a ring with the best set-up the kernel takes, restricted to `wanted`.
    pub(crate) fn build(entries: u32, wanted: &Self) -> std::io::Result<(IoUring, Self)> {
        // From best to plainest. The kernel answers EINVAL to a flag that it does not know.
        // DEFER_TASKRUN requires SINGLE_ISSUER; TASKRUN_FLAG requires COOP_TASKRUN or DEFER_TASKRUN.
        let ladder = [
            (true, true, true),
            (true, false, true),
            (false, false, true),
            (false, false, false),
        ];
        let mut last_error = None;
        for (single, defer, coop) in ladder {
            if single && !wanted.single_issuer
                || defer && !wanted.defer_taskrun
                || coop && !wanted.coop_taskrun
            {
                continue;
            }
            let mut builder = IoUring::builder();
            builder
                .setup_clamp()
                .setup_cqsize(entries.saturating_mul(4));
            if single {
                builder.setup_single_issuer();
            }
            if defer {
                builder.setup_defer_taskrun();
            }
            if coop {
                builder.setup_coop_taskrun();
            }
            if coop || defer {
                builder.setup_taskrun_flag();
            }
            match builder.build(entries) {
                Ok(ring) => {
                    let features = Self::probe(&ring, wanted, single, defer, coop);
                    return Ok((ring, features));
                }
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    last_error = Some(error)
                }
                Err(error) => return Err(error),
            }
        }
        Err(last_error.unwrap_or_else(|| std::io::Error::from_raw_os_error(libc::EINVAL)))
    }

    fn probe(ring: &IoUring, wanted: &Self, single: bool, defer: bool, coop: bool) -> Self {
        let mut probe = Probe::new();
        let probed = ring.submitter().register_probe(&mut probe).is_ok();
        let knows = |code: u8| probed && probe.is_supported(code);
        // SEND_ZC came with 6.0, as did multishot receives, which have no code of their own; the
        // probe of buffer rings (5.19) is the sparse buffer table of the same release.
        let sparse_table = ring
            .submitter()
            .register_buffers_sparse(FIXED_BUFFER_SLOTS)
            .is_ok();
        Self {
            single_issuer: single,
            defer_taskrun: defer,
            coop_taskrun: coop,
            ext_arg: wanted.ext_arg && ring.params().is_feature_ext_arg(),
            buffer_rings: wanted.buffer_rings && sparse_table,
            recv_multishot: wanted.recv_multishot && knows(opcode::SendZc::CODE),
            send_zc: wanted.send_zc && knows(opcode::ReadMulti::CODE),
            fixed_buffers: wanted.fixed_buffers && sparse_table,
        }
    }
}

/// Slots of the registered-buffer table; an empty slot costs 8 bytes in the kernel.
pub(crate) const FIXED_BUFFER_SLOTS: u32 = 1024;
