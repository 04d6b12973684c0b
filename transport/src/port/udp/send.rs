//! The sending side: each train is one `sendmsg` whose gather list the kernel cuts into packets.
#![allow(unsafe_code)]

use std::os::fd::RawFd;

use flexblk_reactor::{Completion, Error, Op, Reactor, Token};

use super::asked::SMALL_TRAIN;
use super::socket::{UDP_SEGMENT, write_address};
use crate::engine::TxMode;
use crate::port::PortCounters;
use crate::train::{Train, TrainId, TrainLimits, TrainQueue};

/// Trains in flight and their message headers.
#[derive(Debug)]
pub(super) struct Sender {
    pub(super) queue: TrainQueue,
    /// One per train; boxed so that the kernel's pointers stay good.
    slots: Box<[Slot]>,
    fd: RawFd,
    owner: u8,
    zero_copy: bool,
    segmenting: bool,
}

/// What the kernel reads of a train besides its gather list.
struct Slot {
    header: libc::msghdr,
    address: libc::sockaddr_storage,
    control: SegmentControl,
}

/// One control message: `UDP_SEGMENT`, 16 bits.
#[repr(C)]
struct SegmentControl {
    header: libc::cmsghdr,
    segment_len: u16,
    pad: [u8; 6],
}

const _: () = assert!(size_of::<SegmentControl>() == size_of::<libc::cmsghdr>() + 8);
/// `CMSG_LEN(2)`.
const SEGMENT_CONTROL_LEN: usize = size_of::<libc::cmsghdr>() + size_of::<u16>();
/// `IORING_NOTIF_USAGE_ZC_COPIED` in the result of a zero-copy notification.
const ZC_COPIED: i32 = i32::MIN;

impl std::fmt::Debug for Slot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Slot")
    }
}

impl Sender {
    pub(super) fn new(
        fd: RawFd,
        owner: u8,
        trains: u16,
        mode: TxMode,
        gso: bool,
        zero_copy: bool,
    ) -> Result<Self, Error> {
        let mut queue = TrainQueue::new(trains, mode, TrainLimits::default())?;
        if !gso {
            queue.disable_segmentation();
        }
        // SAFETY: all zeroes is valid for these C structures.
        let slots = (0..trains.max(1))
            .map(|_| unsafe { std::mem::zeroed() })
            .collect();
        Ok(Self {
            queue,
            slots,
            fd,
            owner,
            zero_copy,
            segmenting: gso,
        })
    }

    /// Queues every train written so far; they leave with the reactor's next turn, small ones at once
    /// when they are to leave `now`. Whether there was one.
    pub(super) fn flush(
        &mut self,
        reactor: &mut Reactor,
        counters: &mut PortCounters,
        now: bool,
        mut sent: Option<&mut dyn FnMut(&Train)>,
    ) -> bool {
        self.queue.finish();
        let mut any = false;
        while let Some(id) = self.queue.next_ready() {
            any = true;
            let (Some(train), Some(slot)) = (self.queue.get(id), self.slots.get_mut(id.index()))
            else {
                continue;
            };
            count(counters, train);
            if let Some(sent) = &mut sent {
                sent(train);
            }
            slot.prepare(train);
            let msg = &raw const slot.header;
            // None may overtake another that the kernel does not have yet.
            let alone = self.queue.in_flight() == 1;
            let small = usize::from(train.packets()) <= SMALL_TRAIN;
            if now && small && alone && !self.zero_copy {
                // SAFETY: as below, and the call has ended before anything is released.
                if unsafe { libc::sendmsg(self.fd, msg, libc::MSG_DONTWAIT) } >= 0 {
                    self.queue.release(id);
                    reactor.note_asked();
                    continue;
                }
                // The ring finds out why.
            }
            let token = Token::new(self.owner, super::SEND_SLOTS | id.index() as u64);
            let op = if self.zero_copy {
                Op::SendMsgZc {
                    fd: self.fd,
                    msg,
                    flags: 0,
                }
            } else {
                Op::SendMsg {
                    fd: self.fd,
                    msg,
                    flags: 0,
                }
            };
            // SAFETY: header, address, control and gather list belong to train and slot, which are
            // boxed and untouched until the completion releases the train; payload is lent to the
            // transport until it is acknowledged. (A retransmission that is overtaken by the
            // acknowledgement of its original may carry changed bytes; the receiver drops it as a
            // duplicate.) The socket is closed after the reactor has let go, see `UdpPort`.
            unsafe { reactor.submit(op, token) };
        }
        any
    }

    /// Cancels every train; those that are not in flight are not found. How many cancellations will complete.
    pub(super) fn cancel(&mut self, reactor: &mut Reactor) -> usize {
        for index in 0..self.slots.len() as u64 {
            let token = Token::new(self.owner, super::SEND_SLOTS | index);
            let cancel = Token::new(self.owner, super::CANCEL_SLOT);
            // SAFETY: no pointers.
            unsafe { reactor.submit(Op::Cancel { token }, cancel) };
        }
        self.slots.len()
    }

    pub(super) fn on_completion(
        &mut self,
        id: TrainId,
        completion: &Completion,
        counters: &mut PortCounters,
    ) {
        if completion.flags.notification() {
            counters.zero_copy_copied += u64::from(completion.result & ZC_COPIED != 0);
        } else if completion.result < 0 {
            let packets = self.queue.get(id).map_or(0, Train::packets);
            self.on_error(-completion.result, packets, counters);
        }
        if !completion.flags.more() {
            self.queue.release(id);
        }
    }

    fn on_error(&mut self, errno: i32, packets: u16, counters: &mut PortCounters) {
        counters.send_errors += 1;
        let cannot_segment = matches!(errno, libc::EIO | libc::EINVAL) && packets > 1;
        if cannot_segment && self.segmenting {
            // No checksum offload on the device, or a segment longer than the path's MTU. The
            // packets of this train are sent again by the engine's recovery.
            counters.gso_fallbacks += 1;
            self.segmenting = false;
            self.queue.disable_segmentation();
            tracing::warn!(
                errno,
                "sending without UDP segmentation offload from now on"
            );
        } else if self.zero_copy && errno == libc::EFAULT {
            // SENDMSG_ZC with segmentation failed so on kernels around 6.7.
            self.zero_copy = false;
            tracing::warn!("sending with copies from now on");
        }
    }
}

impl Slot {
    fn prepare(&mut self, train: &Train) {
        let name_len = write_address(train.destination(), &mut self.address);
        let entries = train.entries();
        self.header.msg_name = (&raw mut self.address).cast();
        self.header.msg_namelen = name_len;
        self.header.msg_iov = entries.as_ptr().cast_mut();
        self.header.msg_iovlen = entries.len() as _;
        if train.packets() > 1 {
            self.control.header.cmsg_level = libc::SOL_UDP;
            self.control.header.cmsg_type = UDP_SEGMENT;
            self.control.header.cmsg_len = SEGMENT_CONTROL_LEN as _;
            self.control.segment_len = train.segment_len() as u16;
            self.header.msg_control = (&raw mut self.control).cast();
            self.header.msg_controllen = size_of::<SegmentControl>() as _;
        } else {
            self.header.msg_control = std::ptr::null_mut();
            self.header.msg_controllen = 0;
        }
    }
}

fn count(counters: &mut PortCounters, train: &Train) {
    counters.trains_tx += 1;
    counters.segments_tx += u64::from(train.packets());
    counters.bytes_tx += u64::from(train.len());
    counters.gather_entries += train.entries().len() as u64;
    let class = train.packets().max(1).ilog2() as usize;
    if let Some(bucket) = counters.trains_tx_by_segments.get_mut(class) {
        *bucket += 1;
    }
}
