//! Connection management datagrams: nothing panics, what is understood means the same after it was
//! emitted again, and a manager that is fed with anything stays within its bounds and forgets.

#![no_main]

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use flexins::cm::mad::{Mad, Message};
use flexins::cm::{
    AcceptArgs, CmConfig, CmEvent, CmManager, ConnectArgs, Features, MAD_LEN_BYTES, Params,
    ServiceId,
};
use libfuzzer_sys::fuzz_target;

const SERVICE: ServiceId = ServiceId::from_port(4420);
const HALF_OPEN: usize = 4;

fuzz_target!(|datagrams: &[u8]| {
    if let Ok(mad) = Mad::parse(datagrams) {
        assert_eq!(Mad::parse(&mad.emit()), Ok(mad));
    }
    let config = CmConfig {
        max_half_open: HALF_OPEN,
        max_connections: 16,
        ..CmConfig::default()
    };
    let mut manager = CmManager::new(config, 1);
    let _ = manager.listen(SERVICE);
    let mut now = Instant::now();
    let params = Params {
        mtu_bytes: 4096,
        window: 256,
        features: Features::all(),
    };
    let connect = ConnectArgs {
        qpn: 5,
        starting_psn: 6,
        local: SocketAddr::from(([127, 0, 0, 1], 1)),
        to: SocketAddr::from(([127, 0, 0, 1], 2)),
        service: SERVICE,
        private: &[],
        params: Some(params),
        path_mtu_bytes: 4096,
        read_depth: 1,
        retry_count: 7,
        rnr_retry_count: 7,
    };
    let accept = AcceptArgs {
        qpn: 7,
        starting_psn: 8,
        private: &[],
        params: Some(params),
        read_depth: 1,
    };
    let ours = manager
        .connect(now, &connect)
        .map(|conn| conn.0)
        .unwrap_or_default();
    let mut newest = ours;
    // Each step: who sends and what is repaired, then a datagram (zeros where the input ends).
    for step in datagrams.chunks(2 + MAD_LEN_BYTES) {
        let (control, bytes) = step.split_at(step.len().min(2));
        let [port, repair] = [0, 1].map(|at| control.get(at).copied().unwrap_or_default());
        let mut mad = [0; MAD_LEN_BYTES];
        mad[..bytes.len()].copy_from_slice(bytes);
        if repair & 1 != 0 {
            mad[..6].copy_from_slice(&[1, 7, 2, 3, 0, 0]);
            mad[16..18].copy_from_slice(&u16::from(0x10 + repair / 32).to_be_bytes());
        }
        if repair & 2 != 0 {
            // The service of a request, the receiver's id of anything else.
            mad[32..40].copy_from_slice(&SERVICE.0.to_be_bytes());
        }
        if repair & 4 != 0 {
            let id = if repair & 8 != 0 { newest } else { ours };
            mad[28..32].copy_from_slice(&id.to_be_bytes());
        }
        let from = SocketAddr::from(([127, 0, 0, 1], u16::from(port % 4)));
        manager.handle_mad(now, from, &mad);
        while let Some(event) = manager.poll_event() {
            if let CmEvent::ConnectRequest { conn, .. } = event {
                newest = conn.0;
                if repair & 16 != 0 {
                    let _ = manager.accept(now, conn, &accept);
                }
            }
        }
        while let Some((_, mad)) = manager.poll_transmit() {
            let mad = Mad::parse(&mad).expect("what is sent is well formed");
            if let Message::Rep(rep) = mad.message {
                assert_eq!(rep.qpn, accept.qpn);
            }
        }
        assert!(manager.half_open() <= HALF_OPEN && manager.active() <= 16);
        now += Duration::from_millis(u64::from(port / 4));
        manager.handle_timeout(now);
    }
    for _ in 0..40 {
        now += Duration::from_secs(5);
        manager.handle_timeout(now);
        while manager.poll_event().is_some() {}
        while manager.poll_transmit().is_some() {}
    }
    assert_eq!(manager.half_open(), 0);
    assert_eq!(
        manager.next_timeout(),
        None,
        "only established connections are left"
    );
});
