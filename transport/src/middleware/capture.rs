//! Packets of an endpoint as a pcapng file that Wireshark and tcpdump read.
//!
//! Sockets show only UDP payload, so IP and UDP headers are made up around it. One interface block
//! of link type "raw IP", timestamps in nanoseconds, direction in the packet's flags
//! (draft-ietf-opsawg-pcapng, sections 4.1 to 4.3). Nothing is dropped: the writer is buffered, and
//! a file system that cannot follow slows the endpoint down. After a write error, or at the size
//! limit, the capture stops, says so once and counts.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

const SECTION_HEADER: u32 = 0x0A0D_0D0A;
const BYTE_ORDER_MAGIC: u32 = 0x1A2B_3C4D;
const INTERFACE_DESCRIPTION: u32 = 1;
const ENHANCED_PACKET: u32 = 6;
const LINKTYPE_RAW: u16 = 101;
const OPT_END: u16 = 0;
const SHB_OS: u16 = 3;
const SHB_USERAPPL: u16 = 4;
const IF_NAME: u16 = 2;
const IF_TSRESOL: u16 = 9;
const EPB_FLAGS: u16 = 2;

const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
const UDP_HEADER: usize = 8;
const PROTOCOL_UDP: u8 = 17;
const HOP_LIMIT: u8 = 64;
const BUFFER_BYTES: usize = 256 << 10;

/// Which way a packet went (pcapng 4.3.1, `epb_flags` bits 0 and 1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// To us.
    Received,
    /// From us.
    Sent,
}

/// A capture file being written.
#[derive(Debug)]
pub struct Capture<W: Write = File> {
    writer: BufWriter<W>,
    /// Where monotonic time is on the calendar.
    epoch: (Instant, Duration),
    limit_bytes: u64,
    /// Packets to and from this address, and this port of it, only.
    peer: Option<(IpAddr, Option<u16>)>,
    written_bytes: u64,
    recorded: u64,
    not_recorded: u64,
    failed: Option<io::Error>,
    block: Vec<u8>,
}

impl Capture<File> {
    /// Creates (or overwrites) a capture file.
    pub fn create(path: &Path) -> io::Result<Self> {
        Self::new(File::create(path)?)
    }
}

impl<W: Write> Capture<W> {
    /// Starts a capture: writes the section header and the interface description.
    pub fn new(writer: W) -> io::Result<Self> {
        let now = Instant::now();
        let since_1970 = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let mut capture = Self {
            writer: BufWriter::with_capacity(BUFFER_BYTES, writer),
            epoch: (now, since_1970),
            limit_bytes: u64::MAX,
            peer: None,
            written_bytes: 0,
            recorded: 0,
            not_recorded: 0,
            failed: None,
            block: Vec::with_capacity(4096),
        };
        capture.section_header();
        capture.write_block()?;
        capture.interface_description();
        capture.write_block()?;
        capture.writer.flush()?;
        Ok(capture)
    }

    /// Stops recording before the file exceeds `limit_bytes`.
    #[must_use]
    pub fn with_limit(mut self, limit_bytes: u64) -> Self {
        self.limit_bytes = limit_bytes;
        self
    }

    /// Records only what goes to and comes from an address, and this port of it.
    #[must_use]
    pub fn with_peer(mut self, ip: IpAddr, port: Option<u16>) -> Self {
        self.peer = Some((ip, port));
        self
    }

    /// Records one packet, given as the pieces of which it consists.
    pub fn record(
        &mut self,
        now: Instant,
        direction: Direction,
        source: SocketAddr,
        destination: SocketAddr,
        pieces: &[&[u8]],
    ) {
        let far = match direction {
            Direction::Received => source,
            Direction::Sent => destination,
        };
        if let Some((ip, port)) = self.peer
            && (far.ip() != ip || port.is_some_and(|port| port != far.port()))
        {
            return;
        }
        if self.failed.is_some() {
            self.not_recorded += 1;
            return;
        }
        self.enhanced_packet(now, direction, source, destination, pieces);
        if self.written_bytes + self.block.len() as u64 > self.limit_bytes {
            self.stop(io::Error::new(
                io::ErrorKind::FileTooLarge,
                "capture size limit reached",
            ));
        } else if let Err(error) = self.write_block() {
            self.stop(error);
        } else {
            self.recorded += 1;
        }
    }

    /// Hands what is buffered to the file system.
    pub fn flush(&mut self) -> io::Result<()> {
        self.writer.flush()
    }

    /// Packets recorded.
    #[must_use]
    pub fn recorded(&self) -> u64 {
        self.recorded
    }

    /// Packets not recorded because the capture had stopped.
    #[must_use]
    pub fn not_recorded(&self) -> u64 {
        self.not_recorded
    }

    /// Why the capture stopped.
    #[must_use]
    pub fn stopped(&self) -> Option<&io::Error> {
        self.failed.as_ref()
    }

    fn stop(&mut self, error: io::Error) {
        tracing::warn!(%error, recorded = self.recorded, "packet capture stopped");
        self.failed = Some(error);
        self.not_recorded += 1;
    }

    fn section_header(&mut self) {
        self.begin(SECTION_HEADER);
        self.put(&BYTE_ORDER_MAGIC.to_le_bytes());
        self.put(&1_u16.to_le_bytes());
        self.put(&0_u16.to_le_bytes());
        self.put(&(-1_i64).to_le_bytes());
        self.option(SHB_OS, std::env::consts::OS.as_bytes());
        self.option(
            SHB_USERAPPL,
            concat!("flexblk ", env!("CARGO_PKG_VERSION")).as_bytes(),
        );
        self.option(OPT_END, &[]);
        self.end();
    }

    fn interface_description(&mut self) {
        self.begin(INTERFACE_DESCRIPTION);
        self.put(&LINKTYPE_RAW.to_le_bytes());
        self.put(&0_u16.to_le_bytes());
        self.put(&0_u32.to_le_bytes());
        self.option(IF_NAME, b"flexins");
        self.option(IF_TSRESOL, &[9]);
        self.option(OPT_END, &[]);
        self.end();
    }

    fn enhanced_packet(
        &mut self,
        now: Instant,
        direction: Direction,
        source: SocketAddr,
        destination: SocketAddr,
        pieces: &[&[u8]],
    ) {
        let payload_len = pieces.iter().map(|piece| piece.len()).sum::<usize>();
        let headers = Headers::new(source, destination, payload_len);
        let len = headers.len() + payload_len;
        let (instant, since_1970) = self.epoch;
        let at = if now >= instant {
            since_1970.saturating_add(now - instant)
        } else {
            since_1970.saturating_sub(instant - now)
        };
        let at_ns = at.as_nanos() as u64;
        self.begin(ENHANCED_PACKET);
        self.put(&0_u32.to_le_bytes());
        self.put(&((at_ns >> 32) as u32).to_le_bytes());
        self.put(&(at_ns as u32).to_le_bytes());
        self.put(&(len as u32).to_le_bytes());
        self.put(&(len as u32).to_le_bytes());
        headers.write(&mut self.block, pieces);
        for piece in pieces {
            self.block.extend_from_slice(piece);
        }
        self.pad();
        let flags: u32 = match direction {
            Direction::Received => 1,
            Direction::Sent => 2,
        };
        self.option(EPB_FLAGS, &flags.to_le_bytes());
        self.option(OPT_END, &[]);
        self.end();
    }

    fn begin(&mut self, block_type: u32) {
        self.block.clear();
        self.put(&block_type.to_le_bytes());
        self.put(&[0; 4]);
    }

    /// Writes the total length at both ends of the block.
    fn end(&mut self) {
        let total = ((self.block.len() + 4) as u32).to_le_bytes();
        if let Some(field) = self.block.get_mut(4..8) {
            field.copy_from_slice(&total);
        }
        self.put(&total);
    }

    fn option(&mut self, code: u16, value: &[u8]) {
        self.put(&code.to_le_bytes());
        self.put(&(value.len() as u16).to_le_bytes());
        self.put(value);
        self.pad();
    }

    fn put(&mut self, bytes: &[u8]) {
        self.block.extend_from_slice(bytes);
    }

    fn pad(&mut self) {
        let padded = self.block.len().next_multiple_of(4);
        self.block.resize(padded, 0);
    }

    fn write_block(&mut self) -> io::Result<()> {
        self.writer.write_all(&self.block)?;
        self.written_bytes += self.block.len() as u64;
        Ok(())
    }
}

/// The IP and UDP headers that a packet has on the wire (as far as a socket knows).
struct Headers {
    source: SocketAddr,
    destination: SocketAddr,
    udp_len: u16,
}

impl Headers {
    fn new(source: SocketAddr, destination: SocketAddr, payload_len: usize) -> Self {
        let udp_len = u16::try_from(payload_len + UDP_HEADER).unwrap_or(u16::MAX);
        // A dual-stack socket shows IPv4 peers as mapped addresses.
        let canonical = |a: SocketAddr| SocketAddr::new(a.ip().to_canonical(), a.port());
        Self {
            source: canonical(source),
            destination: canonical(destination),
            udp_len,
        }
    }

    fn is_v4(&self) -> bool {
        self.source.is_ipv4() && self.destination.is_ipv4()
    }

    fn len(&self) -> usize {
        UDP_HEADER
            + if self.is_v4() {
                IPV4_HEADER
            } else {
                IPV6_HEADER
            }
    }

    fn write(&self, out: &mut Vec<u8>, pieces: &[&[u8]]) {
        let mut pseudo = Checksum::default();
        match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let total_len = self.udp_len.saturating_add(IPV4_HEADER as u16);
                let [len0, len1] = total_len.to_be_bytes();
                let mut header = [0_u8; IPV4_HEADER];
                // Version 4, header of 5 words; don't fragment.
                header[0] = 0x45;
                header[2] = len0;
                header[3] = len1;
                header[6] = 0x40;
                header[8] = HOP_LIMIT;
                header[9] = PROTOCOL_UDP;
                header[12..16].copy_from_slice(&source.octets());
                header[16..20].copy_from_slice(&destination.octets());
                let mut sum = Checksum::default();
                sum.add(&header);
                let [sum0, sum1] = sum.finish().to_be_bytes();
                header[10] = sum0;
                header[11] = sum1;
                out.extend_from_slice(&header);
                pseudo.add(&header[12..20]);
            }
            (source, destination) => {
                let mapped = |ip: IpAddr| match ip {
                    IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                    IpAddr::V6(v6) => v6.octets(),
                };
                let (source, destination) = (mapped(source), mapped(destination));
                out.extend_from_slice(&[0x60, 0, 0, 0]);
                out.extend_from_slice(&self.udp_len.to_be_bytes());
                out.extend_from_slice(&[PROTOCOL_UDP, HOP_LIMIT]);
                out.extend_from_slice(&source);
                out.extend_from_slice(&destination);
                pseudo.add(&source);
                pseudo.add(&destination);
            }
        }
        let mut header = [0_u8; UDP_HEADER];
        header[0..2].copy_from_slice(&self.source.port().to_be_bytes());
        header[2..4].copy_from_slice(&self.destination.port().to_be_bytes());
        header[4..6].copy_from_slice(&self.udp_len.to_be_bytes());
        pseudo.add(&[0, PROTOCOL_UDP]);
        pseudo.add(&self.udp_len.to_be_bytes());
        pseudo.add(&header);
        for piece in pieces {
            pseudo.add(piece);
        }
        // RFC 768: a checksum of zero is sent as all ones.
        let sum = match pseudo.finish() {
            0 => 0xFFFF,
            sum => sum,
        };
        header[6..8].copy_from_slice(&sum.to_be_bytes());
        out.extend_from_slice(&header);
    }
}

/// Internet checksum (RFC 1071) over pieces of any length.
#[derive(Default)]
struct Checksum {
    sum: u64,
    odd: bool,
}

impl Checksum {
    fn add(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            let shift = if self.odd { 0 } else { 8 };
            self.sum += u64::from(byte) << shift;
            self.odd = !self.odd;
        }
    }

    fn finish(&self) -> u16 {
        let mut sum = self.sum;
        while sum > 0xFFFF {
            sum = (sum >> 16) + (sum & 0xFFFF);
        }
        !(sum as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn v4(port: u16) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], port))
    }

    fn v6(port: u16) -> SocketAddr {
        SocketAddr::from(([0, 0, 0, 0, 0, 0, 0, 1], port))
    }

    fn le32(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    /// (type, body) of every block, with the framing checked.
    fn blocks(mut file: &[u8]) -> Vec<(u32, &[u8])> {
        let mut blocks = Vec::new();
        while !file.is_empty() {
            let total = le32(file, 4) as usize;
            assert_eq!(total % 4, 0);
            assert_eq!(le32(file, total - 4) as usize, total);
            blocks.push((le32(file, 0), &file[8..total - 4]));
            file = &file[total..];
        }
        blocks
    }

    fn ones_complement(bytes: &[u8]) -> u16 {
        let mut sum = Checksum::default();
        sum.add(bytes);
        sum.finish()
    }

    fn packet_of(body: &[u8]) -> &[u8] {
        let len = le32(body, 12) as usize;
        assert_eq!(len, le32(body, 16) as usize);
        &body[20..20 + len]
    }

    #[test]
    fn what_is_written_reads_back() {
        let mut file = Vec::new();
        let mut capture = Capture::new(&mut file).unwrap();
        let now = Instant::now();
        let pieces: [&[u8]; 3] = [b"header", b"payload of odd length", b"tail"];
        capture.record(now, Direction::Sent, v4(50_000), v4(4791), &pieces);
        let later = now + Duration::from_nanos(1);
        capture.record(later, Direction::Received, v6(4791), v6(50_000), &[b"x"]);
        assert_eq!(capture.recorded(), 2);
        capture.flush().unwrap();
        drop(capture);

        let blocks = blocks(&file);
        let types: Vec<u32> = blocks.iter().map(|block| block.0).collect();
        assert_eq!(
            types,
            [
                SECTION_HEADER,
                INTERFACE_DESCRIPTION,
                ENHANCED_PACKET,
                ENHANCED_PACKET
            ]
        );
        assert_eq!(le32(blocks[0].1, 0), BYTE_ORDER_MAGIC);
        assert!(blocks[0].1.windows(8).any(|window| window == b"flexblk "));
        assert_eq!(blocks[1].1[..2], 101_u16.to_le_bytes());

        let ip = packet_of(blocks[2].1);
        assert_eq!(ip[0], 0x45);
        assert_eq!(usize::from(u16::from_be_bytes([ip[2], ip[3]])), ip.len());
        assert_eq!(ones_complement(&ip[..20]), 0, "IPv4 header checksum");
        assert_eq!(u16::from_be_bytes([ip[20], ip[21]]), 50_000);
        assert_eq!(u16::from_be_bytes([ip[22], ip[23]]), 4791);
        assert_eq!(&ip[28..], pieces.concat());
        let mut pseudo = ip[12..20].to_vec();
        pseudo.extend_from_slice(&[0, 17, ip[24], ip[25]]);
        pseudo.extend_from_slice(&ip[20..]);
        assert_eq!(ones_complement(&pseudo), 0, "UDP checksum");

        let ip = packet_of(blocks[3].1);
        assert_eq!(ip[0], 0x60);
        assert_eq!(&ip[48..], b"x");
        let mut pseudo = ip[8..40].to_vec();
        pseudo.extend_from_slice(&[0, 17, ip[44], ip[45]]);
        pseudo.extend_from_slice(&ip[40..]);
        assert_eq!(ones_complement(&pseudo), 0, "UDP checksum over IPv6");

        let time = |body: &[u8]| u64::from(le32(body, 4)) << 32 | u64::from(le32(body, 8));
        assert_eq!(time(blocks[3].1), time(blocks[2].1) + 1);
        let since_1970_ns = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_nanos();
        assert!(since_1970_ns.abs_diff(u128::from(time(blocks[2].1))) < 60_000_000_000);
        // epb_flags: the option before the end of options.
        let flags = |body: &[u8]| le32(body, body.len() - 8);
        assert_eq!((flags(blocks[2].1), flags(blocks[3].1)), (2, 1));
    }

    #[test]
    fn a_full_disk_and_a_limit_stop_the_capture_only() {
        struct Full(usize);
        impl Write for Full {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0 = self
                    .0
                    .checked_sub(bytes.len())
                    .ok_or(io::ErrorKind::StorageFull)?;
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let record = |capture: &mut Capture<Full>| {
            for _ in 0..100 {
                let packet = [0; 8192];
                capture.record(Instant::now(), Direction::Sent, v4(1), v4(2), &[&packet]);
            }
        };
        let mut capture = Capture::new(Full(512 << 10)).unwrap();
        record(&mut capture);
        assert_eq!(
            capture.stopped().map(io::Error::kind),
            Some(io::ErrorKind::StorageFull)
        );
        assert_eq!(capture.recorded() + capture.not_recorded(), 100);

        let mut capture = Capture::new(Full(1 << 30)).unwrap().with_limit(100_000);
        record(&mut capture);
        assert_eq!(capture.recorded(), 12);
        assert_eq!(capture.not_recorded(), 88);
    }

    /// Runs where tshark is installed; the test above checks the format everywhere.
    #[test]
    fn tshark_reads_it() {
        if Command::new("tshark").arg("--version").output().is_err() {
            eprintln!("skipped: tshark is not installed");
            return;
        }
        let path = std::env::temp_dir().join(format!("flexins-{}.pcapng", std::process::id()));
        let mut capture = Capture::create(&path).unwrap();
        let now = Instant::now();
        for port in 1..=3 {
            capture.record(now, Direction::Sent, v4(port), v4(9), &[b"hello"]);
        }
        capture.flush().unwrap();
        let output = Command::new("tshark")
            .args([
                "-o",
                "ip.check_checksum:TRUE",
                "-o",
                "udp.check_checksum:TRUE",
            ])
            .args([
                "-T",
                "fields",
                "-e",
                "udp.srcport",
                "-e",
                "udp.checksum.status",
                "-r",
            ])
            .arg(&path)
            .output()
            .unwrap();
        std::fs::remove_file(&path).unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(
            text.lines().collect::<Vec<_>>(),
            ["1\t1", "2\t1", "3\t1"],
            "{output:?}"
        );
    }
}
