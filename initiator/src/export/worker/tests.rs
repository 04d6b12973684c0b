use std::net::Ipv4Addr;
use std::sync::mpsc::{Receiver, Sender, channel};

use flexblk_reactor::{Completion, mailbox};
use flexblk_target::Target;
use flexblk_target::config::{Config, Namespace, Subsystem, TcpListener};
use flexblk_tests::ports::free_udp_port;

use super::*;
use crate::export::{Buffer, Buffers, Geometry, Requests, Wanted};
use crate::volume::{PathOptions, VolumeOptions};
use crate::{ConnectOptions, Host, IoError, Op, TrType};

/// Does what comes by mail: one write or read of the whole of `data`, wherever the volume is.
struct Script {
    mail: mailbox::Receiver<(Op, u64, u8)>,
    done: Sender<Result<Vec<u8>, IoError>>,
    geometry: Geometry,
    requests: Requests,
    buffers: Buffers,
    held: Vec<Buffer>,
    stopping: bool,
}

const LEN_BYTES: u64 = 3 << 20;

impl Guest for Script {
    fn flush(&mut self, _: &mut Reactor) {}
    fn on_completion(&mut self, _: &mut Reactor, _: &Completion) {}
}

impl Server for Script {
    fn start(&mut self, owner: u8, _: &mut Reactor) -> Result<(), Error> {
        assert!(owner >= 128);
        Ok(())
    }

    fn on_io(&mut self, completion: &IoCompletion) {
        if let Some(ended) = self.requests.completed(completion) {
            let mut bytes = Vec::new();
            for buffer in self.held.drain(..) {
                let mut piece = vec![0; buffer.span().len() as usize];
                buffer.span().copy_to_slice(&mut piece);
                bytes.extend(piece);
                self.buffers.put(buffer);
            }
            let _ = self.done.send(ended.result.map(|()| bytes));
        }
    }

    fn submit(&mut self, channel: &mut Channel) {
        while self.requests.has_room() && !self.stopping {
            let Some((op, offset, fill)) = self.mail.try_recv() else {
                break;
            };
            assert!(self.buffers.take_all(LEN_BYTES, &mut self.held));
            for buffer in &self.held {
                buffer.span().fill(fill);
            }
            let wanted = Wanted {
                op,
                extent: self.geometry.extent(offset, LEN_BYTES).unwrap(),
                then_flush: false,
            };
            let spans = self.held.iter().map(Buffer::span);
            self.requests.begin(&wanted, spans, 0).unwrap();
        }
        self.requests
            .submit(|request, tag| channel.submit(request, tag), &mut Vec::new());
    }

    fn stop(&mut self, _: &mut Reactor) {
        self.stopping = true;
    }

    fn is_stopped(&self) -> bool {
        self.stopping && self.requests.outstanding() == 0
    }
}

type Mail = mailbox::Sender<(Op, u64, u8)>;
type Replies = Receiver<Result<Vec<u8>, IoError>>;

/// A target in this process, and a volume there.
fn volume(tcp: bool) -> (Target, Volume) {
    let mut subsystem = Subsystem::new("nqn.2026-11.io.example:disk".parse().unwrap());
    subsystem.namespaces.push(Namespace::new("ram:16M"));
    let mut config = Config {
        subsystems: vec![subsystem],
        tcp: Some(TcpListener {
            address: (Ipv4Addr::LOCALHOST, 0).into(),
            ..TcpListener::default()
        }),
        ..Config::default()
    };
    config.listener.udp_port = free_udp_port().unwrap();
    let target = Target::start(config).unwrap();
    let host = Host {
        hostnqn: "nqn.2026-11.io.example:host".parse().unwrap(),
        hostid: crate::HostId::random(),
    };
    let uri = target.uris().into_iter().next().unwrap();
    let mut connect = ConnectOptions::parse(&uri, host).unwrap();
    if tcp {
        connect.target.trtype = TrType::Tcp;
        connect.target.trsvcid = target.tcp_address().map(|address| address.port());
    }
    let volume = Volume::open(&VolumeOptions {
        poll_budget: Duration::from_micros(10),
        paths: vec![PathOptions {
            connect,
            nsid: None,
        }],
    })
    .unwrap();
    (target, volume)
}

fn start(tcp: bool) -> (Target, Worker, Mail, Replies) {
    let (target, volume) = volume(tcp);
    let geometry = Geometry::of(&volume.namespace().unwrap()).unwrap();
    let (done, replies) = channel();
    let config = WorkerConfig {
        name: "script".into(),
        core: None,
        depth: 4,
    };
    let (worker, mail) = Worker::spawn(&config, &volume, move |channel| {
        let buffers = Buffers::new("script", 4 << 20, 1 << 20)?;
        channel.register_memory(buffers.memory())?;
        let (sender, mail) = mailbox::channel(4, channel.waker());
        let script = Script {
            mail,
            done,
            geometry,
            requests: Requests::new(2, &geometry),
            buffers,
            held: Vec::new(),
            stopping: false,
        };
        Ok((script, sender))
    })
    .unwrap();
    (target, worker, mail, replies)
}

const SOON: Duration = Duration::from_secs(20);

#[test]
fn long_requests_are_cut_and_arrive_whole() {
    for tcp in [false, true] {
        let (_target, worker, mail, replies) = start(tcp);
        mail.try_send((Op::Write { fua: false }, 1 << 20, 0x5a))
            .unwrap();
        replies.recv_timeout(SOON).unwrap().unwrap();
        mail.try_send((Op::Read, 1 << 20, 0)).unwrap();
        let bytes = replies.recv_timeout(SOON).unwrap().unwrap();
        assert_eq!(bytes.len() as u64, LEN_BYTES);
        assert!(bytes.iter().all(|byte| *byte == 0x5a));
        assert!(!worker.has_ended());
        assert!(worker.stop(Duration::from_secs(5)), "over in time");
    }
}

#[test]
fn a_dead_target_does_not_keep_the_thread_alive() {
    for tcp in [false, true] {
        let (target, worker, mail, replies) = start(tcp);
        drop(target);
        mail.try_send((Op::Read, 0, 0)).unwrap();
        let started = Instant::now();
        assert!(worker.stop(Duration::from_secs(5)), "over in time");
        assert!(started.elapsed() < Duration::from_secs(5));
        // It ended with an error, or the server was dropped with it.
        assert!(!matches!(replies.recv_timeout(SOON), Ok(Ok(_))));
    }
}

#[test]
fn a_server_that_cannot_be_made_is_the_callers_error() {
    let (_target, volume) = volume(false);
    for core in [None, Some(usize::MAX)] {
        let config = WorkerConfig {
            name: "broken".into(),
            core,
            depth: 4,
        };
        let made = Worker::spawn::<Script, ()>(&config, &volume, |_| {
            Err(Error::Transport("no device".into()))
        });
        let error = made.map(|_| ()).unwrap_err().to_string();
        let expected = if core.is_some() { "cores" } else { "no device" };
        assert!(error.contains(expected), "{error}");
    }
}
