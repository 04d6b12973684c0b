//! `flexblk resv-*`.

use anyhow::{Context, Result};
use flexblk_initiator::Data;
use flexblk_nvme::U64;
use flexblk_nvme::command::nvm;
use flexblk_nvme::command::reservation::{
    ReservationAcquire, ReservationKeys, ReservationRegister, ReservationRelease,
    ReservationReport, ReservationStatus,
};
use serde_json::{Value, json};

use crate::blocks::open;
use crate::nvme_args::{Inspect, OutputFormat, ResvAcquire, ResvRegister, ResvRelease};

/// Room for 1024 registrants: as much as one command of a block handle carries.
const REPORT_BYTES: usize = 64 + 1024 * 64;

fn keys(current: u64, second: u64) -> ReservationKeys {
    let mut keys = ReservationKeys::zeroed();
    (keys.current, keys.second) = (U64::new(current), U64::new(second));
    keys
}

pub(crate) fn register(args: &ResvRegister) -> Result<()> {
    let (_controller, nsid, mut handle) = open(&args.address, &args.connection)?;
    let command = nvm::Command::ReservationRegister(ReservationRegister {
        nsid,
        action: args.rrega,
        ignore_key: args.iekey,
        persist: args.cptpl,
    });
    let keys = keys(args.crkey, args.nrkey);
    handle.passthrough(&command, Data::Out(keys.bytes()))?;
    Ok(())
}

pub(crate) fn acquire(args: &ResvAcquire) -> Result<()> {
    let (_controller, nsid, mut handle) = open(&args.address, &args.connection)?;
    let command = nvm::Command::ReservationAcquire(ReservationAcquire {
        nsid,
        action: args.racqa,
        ignore_key: args.iekey,
        rtype: args.rtype,
    });
    let keys = keys(args.crkey, args.prkey);
    handle.passthrough(&command, Data::Out(keys.bytes()))?;
    Ok(())
}

pub(crate) fn release(args: &ResvRelease) -> Result<()> {
    let (_controller, nsid, mut handle) = open(&args.address, &args.connection)?;
    let command = nvm::Command::ReservationRelease(ReservationRelease {
        nsid,
        action: args.rrela,
        ignore_key: args.iekey,
        rtype: args.rtype,
    });
    handle.passthrough(&command, Data::Out(&args.crkey.to_le_bytes()))?;
    Ok(())
}

pub(crate) fn report(args: &Inspect) -> Result<()> {
    let (_controller, nsid, mut handle) = open(&args.address, &args.connection)?;
    let mut page = vec![0; REPORT_BYTES];
    let command = nvm::Command::ReservationReport(ReservationReport {
        nsid,
        dwords: (REPORT_BYTES / 4 - 1) as u32,
        extended: true,
    });
    handle.passthrough(&command, Data::In(&mut page))?;
    let (head, registrants) = ReservationStatus::parse(&page).context("the report is cut off")?;
    let list: Vec<Value> = registrants
        .iter()
        .map(|registrant| {
            let hostid: String = registrant
                .hostid
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect();
            json!({
                "cntlid": registrant.cntlid.get(),
                "rcsts": registrant.status,
                "rkey": registrant.key.get(),
                "hostid": hostid,
            })
        })
        .collect();
    if args.output_format == OutputFormat::Json {
        let value = json!({
            "gen": head.generation.get(),
            "rtype": head.rtype,
            "regctl": head.registrants.get(),
            "ptpls": head.persist,
            "regctlext": list,
        });
        println!("{value:#}");
        return Ok(());
    }
    println!("gen       : {}", head.generation.get());
    println!("rtype     : {}", head.rtype);
    println!("regctl    : {}", head.registrants.get());
    println!("ptpls     : {}", head.persist);
    for registrant in &list {
        let hostid = registrant["hostid"].as_str().unwrap_or_default();
        let (key, status) = (&registrant["rkey"], &registrant["rcsts"]);
        println!("host {hostid}: rkey {key}, rcsts {status}");
    }
    Ok(())
}
