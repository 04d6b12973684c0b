//! Every kind of operation against real files and sockets, on the best ring and on the plainest.
#![allow(unsafe_code)]

use std::io::Write as _;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use flexblk_reactor::{
    Completion, Config, Error, Features, HugePages, Op, Reactor, ReceivedMessage, SharedMemory,
    Token, Wait,
};

fn reactors() -> Vec<(&'static str, Reactor)> {
    let config = Config::default();
    vec![
        ("best", Reactor::new(&config).unwrap()),
        (
            "plain",
            Reactor::with_features(&config, &Features::NONE).unwrap(),
        ),
    ]
}

/// Turns until `count` completions have come, at most five seconds.
fn collect(reactor: &mut Reactor, count: usize) -> Vec<Completion> {
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut out = Vec::new();
    while out.len() < count {
        assert!(
            Instant::now() < deadline,
            "{} of {count} after 5 s: {out:?}",
            out.len()
        );
        reactor.turn(Wait::Until(deadline), &mut out).unwrap();
    }
    out
}

fn run(reactor: &mut Reactor, op: Op) -> i32 {
    let token = Token::new(1, 42);
    // SAFETY: the caller waits here for the completion.
    unsafe { reactor.submit(op, token) };
    let done = collect(reactor, 1);
    assert_eq!(done[0].token, token);
    done[0].result
}

#[test]
fn a_file_is_written_synced_read_and_punched() {
    for (name, mut reactor) in reactors() {
        let file = tempfile::tempfile().unwrap();
        let fd = file.as_raw_fd();
        let mut bytes = *b"0123456789abcdef";
        let write = Op::Write {
            fd,
            ptr: bytes.as_ptr(),
            len: 16,
            offset: 4096,
            fixed: None,
            dsync: true,
        };
        assert_eq!(run(&mut reactor, write), 16, "{name}");
        assert_eq!(
            run(
                &mut reactor,
                Op::Fsync {
                    fd,
                    data_only: true
                }
            ),
            0
        );
        let iov = [
            libc::iovec {
                iov_base: bytes.as_mut_ptr().cast(),
                iov_len: 4,
            },
            libc::iovec {
                iov_base: bytes.as_mut_ptr().wrapping_add(8).cast(),
                iov_len: 4,
            },
        ];
        let (iov, n) = (iov.as_ptr(), 2);
        let writev = Op::Writev {
            fd,
            iov,
            n,
            offset: 4100,
            dsync: false,
        };
        assert_eq!(run(&mut reactor, writev), 8);
        let mut back = [0_u8; 16];
        let read = Op::Read {
            fd,
            ptr: back.as_mut_ptr(),
            len: 16,
            offset: 4096,
            fixed: None,
        };
        assert_eq!(run(&mut reactor, read), 16);
        assert_eq!(&back, b"0123012389abcdef");
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        let punch = Op::Fallocate {
            fd,
            mode,
            offset: 4096,
            len: 4,
        };
        let punched = run(&mut reactor, punch);
        assert!(punched == 0 || punched == -libc::EOPNOTSUPP, "{punched}");
        let readv = Op::Readv {
            fd,
            iov,
            n,
            offset: 4112,
        };
        assert_eq!(run(&mut reactor, readv), 0, "at the end of the file");
        assert_eq!(
            run(
                &mut reactor,
                Op::Read {
                    fd: -1,
                    ptr: back.as_mut_ptr(),
                    len: 1,
                    offset: 0,
                    fixed: None
                }
            ),
            -libc::EBADF
        );
        assert_eq!(
            run(
                &mut reactor,
                Op::Close {
                    fd: file.into_raw_fd()
                }
            ),
            0
        );
        assert_eq!(reactor.in_flight(), 0);
    }
}

#[test]
fn registered_buffers_read_and_write() {
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    if !reactor.features().fixed_buffers {
        return;
    }
    let memory = SharedMemory::create("fixed", 64 << 10, HugePages::No).unwrap();
    let (a, b) = (
        memory.span(0, 4096).unwrap(),
        memory.span(8192, 8192).unwrap(),
    );
    assert_eq!(reactor.register_buffers(&[a]).unwrap(), 0);
    assert_eq!(reactor.register_buffers(&[b, a]).unwrap(), 1);
    a.fill(0x5a);
    let file = tempfile::tempfile().unwrap();
    let fd = file.as_raw_fd();
    let write = Op::Write {
        fd,
        ptr: a.as_ptr(),
        len: 4096,
        offset: 0,
        fixed: Some(0),
        dsync: false,
    };
    assert_eq!(run(&mut reactor, write), 4096);
    let inside = b.sub(4096, 4096).unwrap();
    let mut read = Op::Read {
        fd,
        ptr: inside.as_ptr(),
        len: 4096,
        offset: 0,
        fixed: Some(1),
    };
    assert_eq!(run(&mut reactor, read), 4096);
    let mut bytes = vec![0; 4096];
    inside.copy_to_slice(&mut bytes);
    assert!(bytes.iter().all(|&byte| byte == 0x5a));
    if let Op::Read { fixed, .. } = &mut read {
        *fixed = Some(3); // an empty slot
    }
    assert_eq!(run(&mut reactor, read), -libc::EFAULT);
    assert!(matches!(
        reactor.register_buffers(&[a; 1024]),
        Err(Error::Argument(_))
    ));
    let mut plain = Reactor::with_features(&Config::default(), &Features::NONE).unwrap();
    assert!(matches!(
        plain.register_buffers(&[a]),
        Err(Error::Unsupported(_))
    ));
}

#[test]
fn stream_sockets_accept_connect_send_receive_and_shut_down() {
    for (name, mut reactor) in reactors() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        // SAFETY: no pointers.
        unsafe {
            reactor.submit(
                Op::Accept {
                    fd: listener.as_raw_fd(),
                    multi: false,
                },
                Token::new(1, 1),
            );
        }
        reactor.turn(Wait::Poll, &mut Vec::new()).unwrap();
        let client = TcpStream::connect(address).unwrap();
        let accepted = collect(&mut reactor, 1)[0];
        assert_eq!(accepted.token, Token::new(1, 1), "{name}");
        // SAFETY: the accept returned a new descriptor that nobody else owns.
        let server = unsafe { OwnedFd::from_raw_fd(accepted.result) };
        let mut bytes = [0_u8; 8];
        let recv = Op::Recv {
            fd: server.as_raw_fd(),
            ptr: bytes.as_mut_ptr(),
            len: 8,
            flags: 0,
        };
        (&client).write_all(b"hello").unwrap();
        assert_eq!(run(&mut reactor, recv), 5);
        assert_eq!(&bytes[..5], b"hello");
        let send = Op::Send {
            fd: server.as_raw_fd(),
            ptr: bytes.as_ptr(),
            len: 5,
            flags: libc::MSG_NOSIGNAL,
        };
        assert_eq!(run(&mut reactor, send), 5);
        let shutdown = Op::Shutdown {
            fd: client.as_raw_fd(),
            how: libc::SHUT_WR,
        };
        assert_eq!(run(&mut reactor, shutdown), 0);
        assert_eq!(run(&mut reactor, recv), 0, "end of stream");

        // SAFETY: a plain system call; the descriptor is checked and owned at once.
        let socket = unsafe {
            let fd = libc::socket(libc::AF_INET, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0);
            assert!(fd >= 0);
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: all zeroes is a valid sockaddr_storage; sockaddr_in is smaller than it.
        let storage = unsafe {
            let mut storage: libc::sockaddr_storage = std::mem::zeroed();
            (&raw mut storage)
                .cast::<libc::sockaddr_in>()
                .write(libc::sockaddr_in {
                    sin_family: libc::AF_INET as u16,
                    sin_port: address.port().to_be(),
                    sin_addr: libc::in_addr {
                        s_addr: u32::from_ne_bytes([127, 0, 0, 1]),
                    },
                    sin_zero: [0; 8],
                });
            storage
        };
        let connect = Op::Connect {
            fd: socket.as_raw_fd(),
            addr: &raw const storage,
            addr_len: size_of::<libc::sockaddr_in>() as u32,
        };
        assert_eq!(run(&mut reactor, connect), 0);
    }
}

#[test]
fn poll_tells_once_or_again_and_again_and_cancel_ends_it() {
    for (name, mut reactor) in reactors() {
        let (a, b) = (
            UdpSocket::bind("127.0.0.1:0").unwrap(),
            UdpSocket::bind("127.0.0.1:0").unwrap(),
        );
        let poll = Op::PollAdd {
            fd: a.as_raw_fd(),
            mask: libc::POLLIN as u32,
            multi: true,
        };
        // SAFETY: no pointers; the socket lives to the end.
        unsafe { reactor.submit(poll, Token::new(2, 9)) };
        reactor.turn(Wait::Poll, &mut Vec::new()).unwrap();
        for _ in 0..3 {
            b.send_to(b"x", a.local_addr().unwrap()).unwrap();
            let done = collect(&mut reactor, 1);
            assert!(done[0].flags.more(), "{name}");
            assert_eq!(
                done[0].result & i32::from(libc::POLLIN),
                i32::from(libc::POLLIN)
            );
        }
        assert_eq!(reactor.in_flight(), 1);
        // SAFETY: no pointers.
        unsafe {
            reactor.submit(
                Op::Cancel {
                    token: Token::new(2, 9),
                },
                Token::new(2, 10),
            )
        };
        let mut done = collect(&mut reactor, 2);
        done.sort_by_key(|completion| completion.token);
        assert_eq!(
            (done[0].result, done[0].flags.more()),
            (-libc::ECANCELED, false)
        );
        assert_eq!(done[1].result, 0);
        assert_eq!(reactor.in_flight(), 0);
    }
}

#[test]
fn multishot_receive_fills_provided_buffers_and_says_when_they_are_out() {
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    if !reactor.features().recv_multishot || !reactor.features().buffer_rings {
        return;
    }
    let (a, b) = (
        UdpSocket::bind("127.0.0.1:0").unwrap(),
        UdpSocket::bind("127.0.0.1:0").unwrap(),
    );
    let memory = SharedMemory::create("rx", 4 * 4096, HugePages::No).unwrap();
    let mut ring = reactor.register_buffer_ring(7, 4).unwrap();
    assert!(matches!(
        reactor.register_buffer_ring(7, 4),
        Err(Error::Register { .. })
    ));
    assert!(matches!(
        reactor.register_buffer_ring(8, 3),
        Err(Error::Argument(_))
    ));
    for bid in 0..2_u16 {
        // SAFETY: `memory` outlives the reactor's use (declared before, and the test drains).
        unsafe { ring.push(bid, memory.span(u64::from(bid) * 4096, 4096).unwrap()) };
    }
    ring.publish();
    // SAFETY: all zeroes is a valid msghdr; lengths are set below.
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_namelen = 16;
    header.msg_controllen = 0;
    let receive = Op::RecvMsgMulti {
        fd: a.as_raw_fd(),
        msg: &raw const header,
        group: 7,
    };
    // SAFETY: `header` and the buffers live until the final completion below.
    unsafe { reactor.submit(receive, Token::new(3, 0)) };
    reactor.turn(Wait::Poll, &mut Vec::new()).unwrap();
    for n in 0..3_u8 {
        b.send_to(&[n; 100], a.local_addr().unwrap()).unwrap();
    }
    let done = collect(&mut reactor, 3);
    for (n, completion) in done[..2].iter().enumerate() {
        let bid = completion.flags.buffer_id().unwrap();
        let mut bytes = vec![0; completion.bytes().unwrap() as usize];
        memory
            .span(u64::from(bid) * 4096, 4096)
            .unwrap()
            .copy_to_slice(&mut bytes);
        let message = ReceivedMessage::parse(&bytes, 16, 0).unwrap();
        assert_eq!(message.payload, &[n as u8; 100]);
        let port = u16::from_be_bytes([message.name[2], message.name[3]]);
        assert_eq!(port, b.local_addr().unwrap().port());
    }
    assert_eq!(
        (done[2].result, done[2].flags.more()),
        (-libc::ENOBUFS, false)
    );
    // With a buffer again the waiting datagram comes.
    // SAFETY: as above.
    unsafe {
        ring.push(1, memory.span(4096, 4096).unwrap());
        ring.publish();
        reactor.submit(receive, Token::new(3, 1));
    }
    let last = collect(&mut reactor, 1);
    assert_eq!(last[0].flags.buffer_id(), Some(1));
    reactor.unregister_buffer_ring(ring);
    drop(reactor);
}

/// A stream: idle sockets hold no buffer, the one with data takes it, and who finds none is told.
#[test]
fn receive_takes_a_provided_buffer_when_there_is_data() {
    let mut reactor = Reactor::new(&Config::default()).unwrap();
    if !reactor.features().buffer_rings {
        return;
    }
    let (mut a, b) = UnixStream::pair().unwrap();
    let (_silent, c) = UnixStream::pair().unwrap();
    let memory = SharedMemory::create("rx", 4096, HugePages::No).unwrap();
    let mut ring = reactor.register_buffer_ring(9, 1).unwrap();
    // SAFETY: `memory` outlives the reactor's use (declared before, and the test drains).
    unsafe { ring.push(0, memory.span(0, 4096).unwrap()) };
    ring.publish();
    let receive = |fd: RawFd| Op::RecvProvided {
        fd,
        len: 0,
        group: 9,
    };
    // SAFETY: the buffer and both sockets live until the end of the test.
    unsafe {
        reactor.submit(receive(c.as_raw_fd()), Token::new(3, 0));
        reactor.submit(receive(b.as_raw_fd()), Token::new(3, 1));
    }
    reactor.turn(Wait::Poll, &mut Vec::new()).unwrap();
    a.write_all(b"capsule").unwrap();
    let done = collect(&mut reactor, 1);
    assert_eq!(done[0].token, Token::new(3, 1));
    assert_eq!((done[0].result, done[0].flags.buffer_id()), (7, Some(0)));
    let mut bytes = [0; 7];
    memory.span(0, 7).unwrap().copy_to_slice(&mut bytes);
    assert_eq!(&bytes, b"capsule");
    a.write_all(b"more").unwrap();
    // SAFETY: as above.
    unsafe { reactor.submit(receive(b.as_raw_fd()), Token::new(3, 2)) };
    let done = collect(&mut reactor, 1);
    assert_eq!(done[0].result, -libc::ENOBUFS);
    reactor.unregister_buffer_ring(ring);
    drop(reactor);
}

#[test]
fn more_operations_than_the_queue_holds_all_complete() {
    let config = Config {
        entries: 8,
        ..Config::default()
    };
    for features in [Features::ALL, Features::NONE] {
        let mut reactor = Reactor::with_features(&config, &features).unwrap();
        // SAFETY: no pointers.
        (0..1000).for_each(|n| unsafe { reactor.submit(Op::Nop, Token::new(1, n)) });
        let mut slots: Vec<_> = collect(&mut reactor, 1000)
            .iter()
            .map(|c| c.token.slot())
            .collect();
        slots.sort_unstable();
        assert_eq!(slots, (0..1000).collect::<Vec<_>>());
        assert_eq!(reactor.in_flight(), 0);
    }
}

#[test]
fn dropping_the_reactor_ends_what_is_in_flight() {
    for (name, mut reactor) in reactors() {
        let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut bytes = [0_u8; 64];
        let receive = Op::Recv {
            fd: socket.as_raw_fd(),
            ptr: bytes.as_mut_ptr(),
            len: 64,
            flags: 0,
        };
        // SAFETY: `bytes` lives until after the reactor's drop, which waits for the kernel.
        unsafe { reactor.submit(receive, Token::new(1, 1)) };
        reactor.turn(Wait::Poll, &mut Vec::new()).unwrap();
        assert_eq!(reactor.in_flight(), 1);
        let started = Instant::now();
        drop(reactor);
        assert!(started.elapsed() < Duration::from_millis(500), "{name}");
        // A datagram that comes now is not written into the buffer.
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender
            .send_to(&[1; 64], socket.local_addr().unwrap())
            .unwrap();
        let mut late = [0_u8; 64];
        assert_eq!(socket.recv(&mut late).unwrap(), 64);
        assert_eq!(bytes, [0; 64]);
    }
}
