//! `flexblk discover`.

use anyhow::Result;
use flexblk_initiator::{
    AddressFamily, DiscoveryRecord, SubsystemType, TransportId, TransportType,
};
use serde_json::json;

use crate::args;
use crate::connect;

/// Prints the discovery log.
pub(crate) fn discover(args: &args::Discover) -> Result<()> {
    let options = connect::options(&args.address, &args.connection, true)?;
    let log = flexblk_initiator::discover(&options)?;
    if args.json {
        let records: Vec<_> = log.records.iter().map(json_of).collect();
        println!(
            "{:#}",
            json!({ "genctr": log.generation, "records": records })
        );
        return Ok(());
    }
    if log.records.is_empty() {
        println!("no subsystem is offered to this host");
        return Ok(());
    }
    let mut table = comfy_table::Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(["transport", "address", "service", "subsystem", "type"]);
    for record in &log.records {
        table.add_row([
            transport_name(record.trtype),
            record.traddr.clone(),
            record.trsvcid.clone(),
            record.subnqn.to_string(),
            subsystem_name(record.subtype),
        ]);
    }
    println!("{table}");
    Ok(())
}

fn json_of(record: &DiscoveryRecord) -> serde_json::Value {
    json!({
        "trtype": transport_name(record.trtype),
        "adrfam": family_name(record.adrfam),
        "subtype": subsystem_name(record.subtype),
        "traddr": record.traddr,
        "trsvcid": record.trsvcid,
        "subnqn": record.subnqn.to_string(),
        "portid": record.portid,
        "cntlid": record.cntlid.get(),
        "asqsz": record.asqsz,
        "uri": TransportId::from_record(record).map(|id| id.uri()),
    })
}

fn transport_name(trtype: TransportType) -> String {
    match trtype {
        TransportType::Flexins => "flexins".into(),
        TransportType::Tcp => "tcp".into(),
        TransportType::Rdma => "rdma".into(),
        TransportType::FibreChannel => "fc".into(),
        TransportType::IntraHost => "loop".into(),
        other => format!("{:#04x}", other.raw()),
    }
}

fn family_name(adrfam: AddressFamily) -> String {
    match adrfam {
        AddressFamily::Ipv4 => "ipv4".into(),
        AddressFamily::Ipv6 => "ipv6".into(),
        AddressFamily::InfiniBand => "ib".into(),
        AddressFamily::FibreChannel => "fc".into(),
        AddressFamily::IntraHost => "loop".into(),
        other => format!("{:#04x}", other.raw()),
    }
}

fn subsystem_name(subtype: SubsystemType) -> String {
    match subtype {
        SubsystemType::Nvm => "nvme subsystem".into(),
        SubsystemType::Referral => "discovery subsystem referral".into(),
        SubsystemType::CurrentDiscovery => "current discovery subsystem".into(),
        other => format!("{:#04x}", other.raw()),
    }
}
