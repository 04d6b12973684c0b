//! A host with NVMe/TCP: sends the PDUs it is told to, right or wrong, over a real connection.

#![allow(dead_code, reason = "each test uses a part")]

pub(crate) mod world;

use std::collections::{HashMap, VecDeque};
use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use flexblk_nvme::command::Sqe;
use flexblk_nvme::command::admin::{AsyncEventRequest, GetLogPage, SetFeatures};
use flexblk_nvme::command::fabrics::{
    Connect, ConnectAttributes, ConnectData, PropertyGet, PropertySet,
};
use flexblk_nvme::features::{FeatureValue, NumberOfQueues};
use flexblk_nvme::log::LogPageId;
use flexblk_nvme::property::{Cc, Csts, Property};
use flexblk_nvme::tcp::digest::crc32c;
use flexblk_nvme::tcp::{
    Cursor, End, Established, Event, Framing, H2cData, HEAD_MAX, IcReq, IcResp, Pdu, R2t, Stream,
    TermReq,
};
use flexblk_nvme::{Cid, Cntlid, Cqe, HostId, Nqn, Qid, Sgl};

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(15);

/// What came in.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Got {
    Response(Cqe),
    /// All data of a command, and whether its digest was right.
    Data {
        cid: Cid,
        bytes: Vec<u8>,
        success: bool,
        intact: bool,
    },
    R2t(R2t),
    Term(TermReq),
    /// The connection has ended.
    End,
}

/// A connection.
pub(crate) struct Conn {
    pub(crate) socket: TcpStream,
    stream: Stream,
    pub(crate) framing: Framing,
    pub(crate) icresp: Option<IcResp>,
    got: VecDeque<Got>,
    transfers: HashMap<u16, (Cursor, Vec<u8>)>,
    current: Option<(Cid, bool, bool)>,
    next_cid: u16,
    /// Bytes of each write to the socket.
    pub(crate) fragment: usize,
    /// Most data in an H2CData PDU.
    pub(crate) h2c_bytes: u32,
    /// Turns a bit of the digest of what is sent.
    pub(crate) spoil_data_digest: bool,
    /// What its Connects say.
    pub(crate) hostnqn: Nqn,
    pub(crate) hostid: HostId,
    pub(crate) kato_ms: u32,
}

impl Conn {
    pub(crate) fn raw(address: SocketAddr) -> Self {
        let socket = TcpStream::connect(address).unwrap();
        socket.set_read_timeout(Some(LIMIT)).unwrap();
        socket.set_nodelay(true).unwrap();
        Self {
            socket,
            stream: Stream::new(End::Host),
            framing: Framing::default(),
            icresp: None,
            got: VecDeque::new(),
            transfers: HashMap::new(),
            current: None,
            next_cid: 1,
            fragment: usize::MAX,
            h2c_bytes: u32::MAX,
            spoil_data_digest: false,
            hostnqn: Nqn::opaque("nqn.2026-11.test:tcp-host").unwrap(),
            hostid: HostId::from_bytes([7; 16]),
            kato_ms: 120_000,
        }
    }

    /// With ICReq and ICResp exchanged.
    pub(crate) fn open(address: SocketAddr, request: IcReq) -> Self {
        let mut conn = Self::raw(address);
        conn.set_up(request);
        conn
    }

    pub(crate) fn set_up(&mut self, request: IcReq) {
        self.write(&request.emit());
        while self.icresp.is_none() {
            assert!(self.receive(Some(&request)), "no ICResp: {:?}", self.got);
        }
        let response = self.icresp.unwrap();
        self.framing = Framing {
            digests: response.digests,
            alignment: response.cpda,
        };
    }

    pub(crate) fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(self.fragment) {
            self.socket.write_all(chunk).unwrap();
        }
    }

    /// Whatever comes next of the socket; false at its end.
    fn receive(&mut self, request: Option<&IcReq>) -> bool {
        let mut buffer = [0; 65536];
        let len = match self.socket.read(&mut buffer) {
            Ok(0) => return false,
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return false,
            Err(error) => panic!("{error}"),
        };
        let mut input = &buffer[..len];
        loop {
            let event = self.stream.next(&mut input).expect("a right PDU");
            match event {
                None => return true,
                Some(Event::Pdu(pdu)) => self.pdu(pdu, request),
                Some(Event::Data(data)) => {
                    let (cid, ..) = self.current.unwrap();
                    let (_, bytes) = self.transfers.get_mut(&cid.get()).unwrap();
                    bytes.extend_from_slice(data);
                }
                Some(Event::DataEnd { intact }) => {
                    let (cid, last, success) = self.current.take().unwrap();
                    if last {
                        let (_, bytes) = self.transfers.remove(&cid.get()).unwrap();
                        self.got.push_back(Got::Data {
                            cid,
                            bytes,
                            success,
                            intact,
                        });
                    }
                }
            }
        }
    }

    fn pdu(&mut self, pdu: Pdu, request: Option<&IcReq>) {
        match pdu {
            Pdu::IcResp(response) => {
                let request = request.expect("ICResp was asked for");
                response.check(request).unwrap();
                assert_eq!(response.cpda.raw(), 0, "Linux takes no other");
                self.icresp = Some(response);
                self.stream.establish(Established {
                    digests: response.digests,
                    alignment: request.hpda,
                    ..Established::default()
                });
            }
            Pdu::CapsuleResp(cqe) => self.got.push_back(Got::Response(cqe)),
            Pdu::R2t(r2t) => self.got.push_back(Got::R2t(r2t)),
            Pdu::TermReq(term) => self.got.push_back(Got::Term(term)),
            Pdu::C2hData(data) => {
                let (cursor, _) = self
                    .transfers
                    .entry(data.cid.get())
                    .or_insert_with(|| (Cursor::new(0, u32::MAX).unwrap(), Vec::new()));
                cursor
                    .accept(data.offset, data.len_bytes, data.last)
                    .expect("in order");
                self.current = Some((data.cid, data.last, data.success));
            }
            other => panic!("{other:?}"),
        }
    }

    /// The next thing that came in.
    pub(crate) fn next(&mut self) -> Got {
        loop {
            if let Some(got) = self.got.pop_front() {
                return got;
            }
            if !self.receive(None) {
                return Got::End;
            }
        }
    }

    /// The next thing about that command.
    pub(crate) fn next_of(&mut self, cid: Cid) -> Got {
        loop {
            let about = |got: &Got| match got {
                Got::Response(cqe) => cqe.cid() == cid,
                Got::Data { cid: of, .. } => *of == cid,
                Got::R2t(r2t) => r2t.cid == cid,
                Got::Term(_) | Got::End => true,
            };
            if let Some(at) = self.got.iter().position(about) {
                return self.got.remove(at).unwrap();
            }
            if !self.receive(None) {
                return Got::End;
            }
        }
    }

    /// Has the end of that command come in already?
    pub(crate) fn is_answered(&self, cid: Cid) -> bool {
        let of = |got: &Got| matches!(got, Got::Response(cqe) if cqe.cid() == cid);
        self.got.iter().any(of)
    }

    pub(crate) fn cid(&mut self) -> Cid {
        self.next_cid += 1;
        Cid::new(self.next_cid)
    }

    fn data_digest(&self, data: &[u8]) -> Vec<u8> {
        if !self.framing.has_data_digest() {
            return Vec::new();
        }
        let spoiled = u32::from(self.spoil_data_digest);
        (crc32c(data) ^ spoiled).to_le_bytes().to_vec()
    }

    /// The bytes of a command capsule.
    pub(crate) fn capsule(&self, sqe: &[u8; 64], data: &[u8]) -> Vec<u8> {
        let mut head = [0; HEAD_MAX];
        let len = self
            .framing
            .capsule_cmd(Sqe::cast(sqe), data.len() as u32, &mut head);
        let mut bytes = head[..len].to_vec();
        if !data.is_empty() {
            bytes.extend_from_slice(data);
            bytes.extend_from_slice(&self.data_digest(data));
        }
        bytes
    }

    pub(crate) fn send(&mut self, sqe: &[u8; 64], data: &[u8]) {
        let bytes = self.capsule(sqe, data);
        self.write(&bytes);
    }

    /// The bytes of an H2CData PDU.
    pub(crate) fn h2c(&self, header: &H2cData, data: &[u8]) -> Vec<u8> {
        let mut head = [0; HEAD_MAX];
        let len = self.framing.h2c_data(header, &mut head);
        [&head[..len], data, &self.data_digest(data)].concat()
    }

    /// Sends what an R2T asks for.
    pub(crate) fn answer_r2t(&mut self, r2t: &R2t, data: &[u8]) {
        let max = self
            .icresp
            .map_or(u32::MAX, |response| response.maxh2cdata)
            .min(self.h2c_bytes);
        let (mut at, end) = (r2t.offset, r2t.offset + r2t.len_bytes);
        while at < end {
            let len = max.min(end - at);
            let header = H2cData {
                cid: r2t.cid,
                ttag: r2t.ttag,
                offset: at,
                len_bytes: len,
                last: at + len == end,
            };
            let bytes = self.h2c(&header, &data[at as usize..(at + len) as usize]);
            self.write(&bytes);
            at += len;
        }
    }

    /// Sends a command with data that the controller asks for, and waits for its end.
    pub(crate) fn run(&mut self, sqe: &[u8; 64], data: &[u8]) -> (Cqe, Vec<u8>) {
        self.send(sqe, &[]);
        self.finish(Sqe::cast(sqe).cid(), data)
    }

    /// The end of a command: its completion and its data.
    pub(crate) fn finish(&mut self, cid: Cid, data: &[u8]) -> (Cqe, Vec<u8>) {
        let mut received = Vec::new();
        loop {
            match self.next_of(cid) {
                Got::R2t(r2t) => self.answer_r2t(&r2t, data),
                Got::Data {
                    bytes,
                    success,
                    intact,
                    ..
                } => {
                    assert!(intact, "the data digest is right");
                    received = bytes;
                    if success {
                        return (Cqe::success(cid), received);
                    }
                }
                Got::Response(cqe) => return (cqe, received),
                other => panic!("{other:?}"),
            }
        }
    }

    /// The capsule of a Connect.
    pub(crate) fn connect_capsule(
        &mut self,
        qid: u16,
        entries: u16,
        cntlid: Cntlid,
        subnqn: &Nqn,
        flow_control: bool,
    ) -> (Cid, Vec<u8>) {
        let cid = self.cid();
        let connect = Connect {
            qid: Qid::new(qid),
            sqsize: entries - 1,
            cattr: ConnectAttributes::new().with_disable_sq_flow_control(!flow_control),
            kato_ms: if qid == 0 { self.kato_ms } else { 0 },
        };
        let data = ConnectData::new(self.hostid, cntlid, subnqn, &self.hostnqn);
        let sgl = Sgl::InCapsule {
            offset: 0,
            length: ConnectData::SIZE as u32,
        };
        let bytes = self.capsule(&connect.emit(cid, &sgl), data.bytes());
        (cid, bytes)
    }

    pub(crate) fn connect(
        &mut self,
        qid: u16,
        entries: u16,
        cntlid: Cntlid,
        subnqn: &Nqn,
        flow_control: bool,
    ) -> Cqe {
        let (cid, bytes) = self.connect_capsule(qid, entries, cntlid, subnqn, flow_control);
        self.write(&bytes);
        self.finish(cid, &[]).0
    }

    /// Enables the controller whose Admin queue this is, and asks for I/O queues.
    pub(crate) fn enable(&mut self, queues: u16) {
        self.set_cc(Cc::ENABLE);
        let cqe = self.set_features(NumberOfQueues::of(queues));
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
    }

    /// Sets CC.
    pub(crate) fn set_cc(&mut self, cc: Cc) {
        let cid = self.cid();
        let set = PropertySet {
            offset: Property::Cc.offset(),
            width: Property::Cc.width(),
            value: cc.into_bits().into(),
        };
        let (cqe, _) = self.run(&set.emit(cid, &Sgl::NONE_TRANSPORT), &[]);
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
    }

    /// CSTS.
    pub(crate) fn csts(&mut self) -> Csts {
        let cid = self.cid();
        let get = PropertyGet {
            offset: Property::Csts.offset(),
            width: Property::Csts.width(),
        };
        let (cqe, _) = self.run(&get.emit(cid, &Sgl::NONE_TRANSPORT), &[]);
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
        Csts::from_bits(cqe.dword0())
    }

    /// Sets a feature without data.
    pub(crate) fn set_features(&mut self, value: impl Into<FeatureValue>) -> Cqe {
        let cid = self.cid();
        let set = SetFeatures::new(value.into());
        self.run(&set.emit(cid, &Sgl::NONE_TRANSPORT), &[]).0
    }

    /// A log page.
    pub(crate) fn log(&mut self, lid: LogPageId, len: u32) -> Vec<u8> {
        let cid = self.cid();
        let sgl = Sgl::Transport { length: len };
        let (cqe, page) = self.run(&GetLogPage::new(lid, 0, len).emit(cid, &sgl), &[]);
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
        page
    }

    /// Sends an Asynchronous Event Request.
    pub(crate) fn request_event(&mut self) -> Cid {
        let cid = self.cid();
        self.send(&AsyncEventRequest.emit(cid, &Sgl::NONE_TRANSPORT), &[]);
        cid
    }
}

/// A controller with one I/O queue.
pub(crate) struct Pair {
    pub(crate) admin: Conn,
    pub(crate) io: Conn,
    pub(crate) cntlid: Cntlid,
}

impl Pair {
    pub(crate) fn new(
        address: SocketAddr,
        request: IcReq,
        subnqn: &Nqn,
        entries: u16,
        flow_control: bool,
    ) -> Self {
        let admin = Conn::open(address, request);
        Self::on(admin, address, request, subnqn, entries, flow_control)
    }

    /// With that connection for the Admin queue, and what its Connect is to say.
    pub(crate) fn on(
        mut admin: Conn,
        address: SocketAddr,
        request: IcReq,
        subnqn: &Nqn,
        entries: u16,
        flow_control: bool,
    ) -> Self {
        let cqe = admin.connect(0, 32, Cntlid::DYNAMIC, subnqn, true);
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
        let cntlid = Cntlid::new(cqe.dword0() as u16);
        admin.enable(4);
        let mut io = Conn::open(address, request);
        (io.hostnqn, io.hostid) = (admin.hostnqn.clone(), admin.hostid);
        let cqe = io.connect(1, entries, cntlid, subnqn, flow_control);
        assert!(cqe.status().is_success(), "{:?}", cqe.status());
        Self { admin, io, cntlid }
    }
}
