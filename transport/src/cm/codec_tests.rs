//! Tests of the datagram codec.

use std::net::IpAddr;

use proptest::prelude::*;

use super::mad::{
    About, IpHeader, MAD_LEN_BYTES, Mad, MadError, Message, Rej, RejectReason, Rep, Req, ServiceId,
    path_mtu_bytes, path_mtu_code,
};

fn u24() -> impl Strategy<Value = u32> {
    0_u32..1 << 24
}

fn any_about() -> impl Strategy<Value = About> {
    prop_oneof![Just(About::Req), Just(About::Rep), Just(About::Nothing)]
}

prop_compose! {
    fn any_req()(
        (local_id, service, ca_guid, qpn) in (any::<u32>(), any::<u64>(), any::<u64>(), u24()),
        (responder_resources, initiator_depth) in any::<(u8, u8)>(),
        (remote_response_timeout, local_response_timeout) in (0_u8..32, 0_u8..32),
        (starting_psn, pkey, path_mtu) in (u24(), any::<u16>(), 1_u8..=5),
        (retry_count, rnr_retry_count, max_cm_retries) in (0_u8..8, 0_u8..8, 0_u8..16),
        (hop_limit, ack_timeout) in (any::<u8>(), 0_u8..32),
        (local_gid, remote_gid) in any::<([u8; 16], [u8; 16])>(),
        private in proptest::array::uniform(any::<u8>()),
    ) -> Req {
        Req {
            local_id, service: ServiceId(service), ca_guid, qpn, responder_resources,
            initiator_depth, remote_response_timeout, starting_psn, local_response_timeout,
            retry_count, pkey, path_mtu, rnr_retry_count, max_cm_retries, local_gid, remote_gid,
            hop_limit, ack_timeout, private,
        }
    }
}

prop_compose! {
    fn any_rep()(
        (local_id, remote_id, qpn, starting_psn) in (any::<u32>(), any::<u32>(), u24(), u24()),
        (responder_resources, initiator_depth) in any::<(u8, u8)>(),
        (ack_delay, rnr_retry_count, ca_guid) in (0_u8..32, 0_u8..8, any::<u64>()),
        private in proptest::array::uniform(any::<u8>()),
    ) -> Rep {
        Rep {
            local_id, remote_id, qpn, starting_psn, responder_resources, initiator_depth,
            ack_delay, rnr_retry_count, ca_guid, private,
        }
    }
}

pub(super) fn any_message() -> impl Strategy<Value = Message> {
    let ids = any::<(u32, u32)>();
    prop_oneof![
        any_req().prop_map(Message::Req),
        any_rep().prop_map(Message::Rep),
        (any::<(u32, u32)>(), any_about(), 0_u8..32).prop_map(|(ids, about, service_timeout)| {
            Message::Mra {
                local_id: ids.0,
                remote_id: ids.1,
                about,
                service_timeout,
            }
        }),
        (
            ids,
            any_about(),
            any::<u16>(),
            proptest::array::uniform(any::<u8>())
        )
            .prop_map(|((local_id, remote_id), about, code, private)| {
                let reason = RejectReason::from_code(code);
                Message::Rej(Rej {
                    local_id,
                    remote_id,
                    about,
                    reason,
                    private,
                })
            }),
        any::<(u32, u32)>().prop_map(|(local_id, remote_id)| Message::Rtu {
            local_id,
            remote_id
        }),
        (any::<(u32, u32)>(), u24()).prop_map(|((local_id, remote_id), remote_qpn)| {
            Message::Dreq {
                local_id,
                remote_id,
                remote_qpn,
            }
        }),
        any::<(u32, u32)>().prop_map(|(local_id, remote_id)| Message::Drep {
            local_id,
            remote_id
        }),
    ]
}

proptest! {
    #[test]
    fn every_message_round_trips(transaction in any::<u64>(), message in any_message()) {
        let mad = Mad { transaction, message };
        prop_assert_eq!(Mad::parse(&mad.emit()), Ok(mad));
    }

    #[test]
    fn what_parses_is_stable(bytes in proptest::array::uniform::<_, MAD_LEN_BYTES>(any::<u8>()), attribute in 0x0F_u16..0x18) {
        let mut bytes = bytes;
        bytes[..6].copy_from_slice(&[1, 7, 2, 3, 0, 0]);
        bytes[16..18].copy_from_slice(&attribute.to_be_bytes());
        if let Ok(mad) = Mad::parse(&bytes) {
            prop_assert_eq!(Mad::parse(&mad.emit()), Ok(mad));
        }
    }

    #[test]
    fn ip_header_round_trips(source_port in any::<u16>(), v4 in any::<bool>(), a in any::<[u8; 16]>(), b in any::<[u8; 16]>()) {
        let address = |octets: [u8; 16]| match v4 {
            true => IpAddr::from([octets[0], octets[1], octets[2], octets[3]]),
            false => IpAddr::from(octets),
        };
        let header = IpHeader { source_port, source: address(a), destination: address(b) };
        prop_assert_eq!(IpHeader::parse(&header.emit()), Some(header));
    }

    #[test]
    fn reasons_round_trip(code in any::<u16>()) {
        prop_assert_eq!(RejectReason::from_code(code).code(), code);
    }

}

#[test]
fn fields_lie_where_the_specification_puts_them() {
    let req = Req {
        local_id: 0x0102_0304,
        service: ServiceId::from_port(4420),
        ca_guid: 0x1112_1314_1516_1718,
        qpn: 0x00AB_CDEF,
        responder_resources: 4,
        initiator_depth: 5,
        remote_response_timeout: 19,
        starting_psn: 0x0012_3456,
        local_response_timeout: 20,
        retry_count: 7,
        pkey: 0xFFFF,
        path_mtu: 5,
        rnr_retry_count: 6,
        max_cm_retries: 15,
        local_gid: [0xAA; 16],
        remote_gid: [0xBB; 16],
        hop_limit: 64,
        ack_timeout: 18,
        private: [0xCC; 92],
    };
    let mad = Mad {
        transaction: 0x2122_2324_2526_2728,
        message: Message::Req(req),
    }
    .emit();
    assert_eq!(mad[..4], [1, 7, 2, 3]);
    assert_eq!(mad[8..16], 0x2122_2324_2526_2728_u64.to_be_bytes());
    assert_eq!(mad[16..18], [0, 0x10]);
    assert_eq!(mad[24..28], [1, 2, 3, 4]);
    assert_eq!(mad[32..40], 0x0000_0000_0106_1144_u64.to_be_bytes());
    assert_eq!(mad[56..60], [0xAB, 0xCD, 0xEF, 4]);
    assert_eq!(mad[63], 5);
    assert_eq!(mad[67], 19 << 3);
    assert_eq!(mad[68..72], [0x12, 0x34, 0x56, 20 << 3 | 7]);
    assert_eq!(mad[72..76], [0xFF, 0xFF, 5 << 4 | 6, 15 << 4]);
    assert_eq!(mad[80..96], [0xAA; 16]);
    assert_eq!(mad[96..112], [0xBB; 16]);
    assert_eq!(mad[117], 64);
    assert_eq!(mad[119], 18 << 3);
    assert_eq!(mad[164..], [0xCC; 92]);
}

#[test]
fn refuses_what_is_no_datagram_of_ours() {
    assert_eq!(Mad::parse(&[0; 255]), Err(MadError::Length(255)));
    assert_eq!(Mad::parse(&[0; 256]), Err(MadError::Class));
    let mut mad = Mad {
        transaction: 0,
        message: Message::Rtu {
            local_id: 1,
            remote_id: 2,
        },
    }
    .emit();
    mad[17] = 0x17;
    assert_eq!(Mad::parse(&mad), Err(MadError::Attribute(0x17)));
}

#[test]
fn mtu_codes() {
    for (mtu_bytes, code) in [(256, 1), (512, 2), (1024, 3), (2048, 4), (4096, 5)] {
        assert_eq!(path_mtu_code(mtu_bytes), code);
        assert_eq!(path_mtu_bytes(code), mtu_bytes);
    }
    assert_eq!(path_mtu_code(4095), 4);
    assert_eq!(path_mtu_code(9000), 5);
}
