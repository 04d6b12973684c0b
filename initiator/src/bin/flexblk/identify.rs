//! `flexblk id-ctrl` and `id-ns`: every field, under nvme-cli's name, in the order of the structure.

use anyhow::{Context, Result};
use flexblk_initiator::Nsid;
use flexblk_nvme::command::admin::Cns;
use flexblk_nvme::identify::{Controller, Namespace, PowerState};
use flexblk_nvme::text::trim_ascii;
use serde_json::{Map, Value, json};

use crate::inspect::{controller, wide};
use crate::nvme_args::{Inspect, OutputFormat};

/// How people read a number; JSON has decimal ones.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Base {
    Decimal,
    Hexadecimal,
}

/// A field of the structure `T`.
struct Field<T> {
    name: &'static str,
    base: Base,
    value: fn(&T) -> Value,
}

const fn dec<T>(name: &'static str, value: fn(&T) -> Value) -> Field<T> {
    Field {
        name,
        base: Base::Decimal,
        value,
    }
}

const fn hex<T>(name: &'static str, value: fn(&T) -> Value) -> Field<T> {
    Field {
        name,
        base: Base::Hexadecimal,
        value,
    }
}

/// Identify Controller (Base 5.1.13.2.1) but its power states.
const CONTROLLER: &[Field<Controller>] = &[
    hex("vid", |c| c.vid.get().into()),
    hex("ssvid", |c| c.ssvid.get().into()),
    dec("sn", |c| trim_ascii(&c.sn).into()),
    dec("mn", |c| trim_ascii(&c.mn).into()),
    dec("fr", |c| trim_ascii(&c.fr).into()),
    dec("rab", |c| c.rab.into()),
    hex("ieee", |c| {
        let [low, middle, high] = c.ieee;
        u32::from_le_bytes([low, middle, high, 0]).into()
    }),
    hex("cmic", |c| c.cmic.into()),
    dec("mdts", |c| c.mdts.into()),
    hex("cntlid", |c| c.cntlid.get().into()),
    hex("ver", |c| c.ver.get().into()),
    dec("rtd3r", |c| c.rtd3r.get().into()),
    dec("rtd3e", |c| c.rtd3e.get().into()),
    hex("oaes", |c| c.oaes.get().into()),
    hex("ctratt", |c| c.ctratt.get().into()),
    dec("rrls", |c| c.rrls.get().into()),
    hex("bpcap", |c| c.bpcap.into()),
    dec("nssl", |c| c.nssl.get().into()),
    dec("plsi", |c| c.plsi.into()),
    dec("cntrltype", |c| c.cntrltype.into()),
    dec("fguid", |c| {
        uuid::Uuid::from_bytes(c.fguid).to_string().into()
    }),
    dec("crdt1", |c| c.crdt1.get().into()),
    dec("crdt2", |c| c.crdt2.get().into()),
    dec("crdt3", |c| c.crdt3.get().into()),
    hex("crcap", |c| c.crcap.into()),
    dec("nvmsr", |c| c.nvmsr.into()),
    dec("vwci", |c| c.vwci.into()),
    dec("mec", |c| c.mec.into()),
    hex("oacs", |c| c.oacs.get().into()),
    dec("acl", |c| c.acl.into()),
    dec("aerl", |c| c.aerl.into()),
    hex("frmw", |c| c.frmw.into()),
    hex("lpa", |c| c.lpa.into()),
    dec("elpe", |c| c.elpe.into()),
    dec("npss", |c| c.npss.into()),
    hex("avscc", |c| c.avscc.into()),
    hex("apsta", |c| c.apsta.into()),
    dec("wctemp", |c| c.wctemp.get().into()),
    dec("cctemp", |c| c.cctemp.get().into()),
    dec("mtfa", |c| c.mtfa.get().into()),
    dec("hmpre", |c| c.hmpre.get().into()),
    dec("hmmin", |c| c.hmmin.get().into()),
    dec("tnvmcap", |c| wide(c.tnvmcap.get())),
    dec("unvmcap", |c| wide(c.unvmcap.get())),
    hex("rpmbs", |c| c.rpmbs.get().into()),
    dec("edstt", |c| c.edstt.get().into()),
    dec("dsto", |c| c.dsto.into()),
    dec("fwug", |c| c.fwug.into()),
    dec("kas", |c| c.kas.get().into()),
    hex("hctma", |c| c.hctma.get().into()),
    dec("mntmt", |c| c.mntmt.get().into()),
    dec("mxtmt", |c| c.mxtmt.get().into()),
    hex("sanicap", |c| c.sanicap.get().into()),
    dec("hmminds", |c| c.hmminds.get().into()),
    dec("hmmaxd", |c| c.hmmaxd.get().into()),
    dec("nsetidmax", |c| c.nsetidmax.get().into()),
    dec("endgidmax", |c| c.endgidmax.get().into()),
    dec("anatt", |c| c.anatt.into()),
    hex("anacap", |c| c.anacap.into()),
    dec("anagrpmax", |c| c.anagrpmax.get().into()),
    dec("nanagrpid", |c| c.nanagrpid.get().into()),
    dec("pels", |c| c.pels.get().into()),
    dec("domainid", |c| c.did.get().into()),
    hex("kpioc", |c| c.kpioc.into()),
    dec("mptfawr", |c| c.mptfawr.get().into()),
    dec("megcap", |c| wide(c.megcap.get())),
    hex("tmpthha", |c| c.tmpthha.into()),
    dec("cqt", |c| c.cqt.get().into()),
    hex("sqes", |c| c.sqes.into()),
    hex("cqes", |c| c.cqes.into()),
    dec("maxcmd", |c| c.maxcmd.get().into()),
    dec("nn", |c| c.nn.get().into()),
    hex("oncs", |c| c.oncs.get().into()),
    hex("fuses", |c| c.fuses.get().into()),
    hex("fna", |c| c.fna.into()),
    hex("vwc", |c| c.vwc.into()),
    dec("awun", |c| c.awun.get().into()),
    dec("awupf", |c| c.awupf.get().into()),
    dec("icsvscc", |c| c.icsvscc.into()),
    dec("nwpc", |c| c.nwpc.into()),
    dec("acwu", |c| c.acwu.get().into()),
    hex("ocfs", |c| c.cdfs.get().into()),
    hex("sgls", |c| c.sgls.get().into()),
    dec("mnan", |c| c.mnan.get().into()),
    dec("maxdna", |c| wide(c.maxdna.get())),
    dec("maxcna", |c| c.maxcna.get().into()),
    dec("oaqd", |c| c.oaqd.get().into()),
    dec("rhiri", |c| c.rhiri.into()),
    dec("hirt", |c| c.hirt.into()),
    dec("cmmrtd", |c| c.cmmrtd.get().into()),
    dec("nmmrtd", |c| c.nmmrtd.get().into()),
    dec("minmrtg", |c| c.minmrtg.into()),
    dec("maxmrtg", |c| c.maxmrtg.into()),
    hex("trattr", |c| c.trattr.into()),
    dec("mcudmq", |c| c.mcudmq.get().into()),
    dec("mnsudmq", |c| c.mnsudmq.get().into()),
    dec("mcmr", |c| c.mcmr.get().into()),
    dec("nmcmr", |c| c.nmcmr.get().into()),
    dec("mcdqpc", |c| c.mcdqpc.get().into()),
    dec("subnqn", |c| trim_ascii(&c.subnqn).into()),
    dec("ioccsz", |c| c.ioccsz.get().into()),
    dec("iorcsz", |c| c.iorcsz.get().into()),
    dec("icdoff", |c| c.icdoff.get().into()),
    hex("fcatt", |c| c.fcatt.into()),
    dec("msdbd", |c| c.msdbd.into()),
    hex("ofcs", |c| c.ofcs.get().into()),
    dec("dctype", |c| c.dctype.into()),
];

/// A power state (Base 5.1.13.2.1).
const POWER_STATE: &[Field<PowerState>] = &[
    dec("max_power", |ps| ps.mp.get().into()),
    dec("max_power_scale", |ps| (ps.flags & 1).into()),
    dec("non-operational_state", |ps| (ps.flags >> 1 & 1).into()),
    dec("entry_lat", |ps| ps.enlat.get().into()),
    dec("exit_lat", |ps| ps.exlat.get().into()),
    dec("read_tput", |ps| ps.rrt.into()),
    dec("read_lat", |ps| ps.rrl.into()),
    dec("write_tput", |ps| ps.rwt.into()),
    dec("write_lat", |ps| ps.rwl.into()),
    dec("idle_power", |ps| ps.idlp.get().into()),
    dec("idle_scale", |ps| (ps.ips >> 6).into()),
    dec("active_power", |ps| ps.actp.get().into()),
    dec("active_power_work", |ps| (ps.apw & 7).into()),
    dec("active_scale", |ps| (ps.apw >> 6).into()),
];

/// Identify Namespace (NVM 4.1.5.1) but its LBA formats.
const NAMESPACE: &[Field<Namespace>] = &[
    hex("nsze", |ns| ns.nsze.get().into()),
    hex("ncap", |ns| ns.ncap.get().into()),
    hex("nuse", |ns| ns.nuse.get().into()),
    hex("nsfeat", |ns| ns.nsfeat.into()),
    dec("nlbaf", |ns| ns.nlbaf.into()),
    hex("flbas", |ns| ns.flbas.into()),
    hex("mc", |ns| ns.mc.into()),
    hex("dpc", |ns| ns.dpc.into()),
    hex("dps", |ns| ns.dps.into()),
    hex("nmic", |ns| ns.nmic.into()),
    hex("rescap", |ns| ns.rescap.into()),
    hex("fpi", |ns| ns.fpi.into()),
    dec("dlfeat", |ns| ns.dlfeat.into()),
    dec("nawun", |ns| ns.nawun.get().into()),
    dec("nawupf", |ns| ns.nawupf.get().into()),
    dec("nacwu", |ns| ns.nacwu.get().into()),
    dec("nabsn", |ns| ns.nabsn.get().into()),
    dec("nabo", |ns| ns.nabo.get().into()),
    dec("nabspf", |ns| ns.nabspf.get().into()),
    dec("noiob", |ns| ns.noiob.get().into()),
    dec("nvmcap", |ns| wide(ns.nvmcap.get())),
    dec("npwg", |ns| ns.npwg.get().into()),
    dec("npwa", |ns| ns.npwa.get().into()),
    dec("npdg", |ns| ns.npdg.get().into()),
    dec("npda", |ns| ns.npda.get().into()),
    dec("nows", |ns| ns.nows.get().into()),
    dec("mssrl", |ns| ns.mssrl.get().into()),
    dec("mcl", |ns| ns.mcl.get().into()),
    dec("msrc", |ns| ns.msrc.into()),
    hex("kpios", |ns| ns.kpios.into()),
    dec("nulbaf", |ns| ns.nulbaf.into()),
    dec("kpiodaag", |ns| ns.kpiodaag.get().into()),
    dec("anagrpid", |ns| ns.anagrpid.get().into()),
    hex("nsattr", |ns| ns.nsattr.into()),
    dec("nvmsetid", |ns| ns.nvmsetid.get().into()),
    dec("endgid", |ns| ns.endgid.get().into()),
    dec("nguid", |ns| digits(&ns.nguid)),
    dec("eui64", |ns| digits(&ns.eui64)),
];

/// An LBA format (NVM 4.1.5.1).
const LBA_FORMAT: &[Field<u32>] = &[
    dec("ms", |format| (format & 0xFFFF).into()),
    dec("ds", |format| (format >> 16 & 0xFF).into()),
    hex("rp", |format| (format >> 24 & 3).into()),
];

fn digits(bytes: &[u8]) -> Value {
    let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    text.into()
}

impl<T> Field<T> {
    /// What people read.
    fn text(&self, of: &T) -> String {
        match (self.base, (self.value)(of)) {
            (_, Value::String(text)) => text,
            (Base::Hexadecimal, Value::Number(number)) => {
                format!("{:#x}", number.as_u64().unwrap_or_default())
            }
            (_, value) => value.to_string(),
        }
    }
}

fn object<T>(fields: &[Field<T>], of: &T) -> Map<String, Value> {
    let members = fields.iter();
    members
        .map(|field| (field.name.to_owned(), (field.value)(of)))
        .collect()
}

/// A structure, and what it has several of.
struct Structure<'a, T, U> {
    title: String,
    fields: &'a [Field<T>],
    value: &'a T,
    /// The list's name in JSON, and for people.
    list_names: [&'a str; 2],
    list_fields: &'a [Field<U>],
    list: Vec<U>,
}

impl<T, U> Structure<'_, T, U> {
    fn print(&self, format: OutputFormat) {
        let [key, label] = self.list_names;
        if format == OutputFormat::Json {
            let mut members = object(self.fields, self.value);
            let list = self.list.iter();
            let list: Vec<Value> = list
                .map(|entry| object(self.list_fields, entry).into())
                .collect();
            members.insert(key.to_owned(), list.into());
            println!("{:#}", json!(members));
            return;
        }
        println!("{}:", self.title);
        for field in self.fields {
            println!("{:<10}: {}", field.name, field.text(self.value));
        }
        for (number, entry) in self.list.iter().enumerate() {
            let parts = self.list_fields.iter();
            let parts: Vec<String> = parts
                .map(|field| format!("{}:{}", field.name, field.text(entry)))
                .collect();
            println!("{label} {number:>2} : {}", parts.join(" "));
        }
    }
}

pub(crate) fn id_ctrl(args: &Inspect) -> Result<()> {
    let controller = controller(args)?;
    let bytes = controller.identify_structure(Cns::Controller, Nsid::NONE)?;
    let id = Controller::view(&bytes).context("Identify Controller is cut off")?;
    let states = id.psd.iter().take(usize::from(id.npss) + 1);
    Structure {
        title: "NVME Identify Controller".to_owned(),
        fields: CONTROLLER,
        value: id,
        list_names: ["psds", "ps"],
        list_fields: POWER_STATE,
        list: states.copied().collect(),
    }
    .print(args.output_format);
    Ok(())
}

pub(crate) fn id_ns(args: &Inspect) -> Result<()> {
    let controller = controller(args)?;
    let nsid = controller.options().target.nsid.unwrap_or(Nsid::new(1));
    controller.namespace(nsid)?;
    let bytes = controller.identify_structure(Cns::Namespace, nsid)?;
    let id = Namespace::view(&bytes).context("Identify Namespace is cut off")?;
    let formats = id.lbaf.iter().take(usize::from(id.nlbaf) + 1);
    Structure {
        title: format!("NVME Identify Namespace {nsid}"),
        fields: NAMESPACE,
        value: id,
        list_names: ["lbafs", "lbaf"],
        list_fields: LBA_FORMAT,
        list: formats.map(|format| format.get()).collect(),
    }
    .print(args.output_format);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each name once: JSON would lose the second.
    #[test]
    fn names_differ() {
        let controller = object(CONTROLLER, &Controller::zeroed());
        assert_eq!(controller.len(), CONTROLLER.len());
        let namespace = object(NAMESPACE, &Namespace::zeroed());
        assert_eq!(namespace.len(), NAMESPACE.len());
        let state = object(POWER_STATE, &PowerState::zeroed());
        assert_eq!(state.len(), POWER_STATE.len());
    }

    #[test]
    fn people_read_bits_in_hexadecimal() {
        let mut id = Controller::zeroed();
        id.ieee = [0x01, 0x02, 0xA3];
        id.nn.set(1024);
        let text = |name: &str| {
            let field = CONTROLLER.iter().find(|field| field.name == name);
            field.unwrap().text(&id)
        };
        assert_eq!(text("ieee"), "0xa30201");
        assert_eq!(text("nn"), "1024");
        assert_eq!(text("fguid"), "00000000-0000-0000-0000-000000000000");
    }
}
